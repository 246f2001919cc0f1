"""FARMER: the flow and the prior together, an exact density over images (arXiv 2510.23588)."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from farmer_jax import config
from farmer_jax.nn import flow, prior, transformer
from farmer_jax.ops import patches


@flax.struct.dataclass
class LogDensity:
  """The terms of log p(x | c), in nats, an entry an image."""

  tokens: jax.Array  # [B, N], log-density of each token's informative channels, in raster order
  redundant: jax.Array  # [B], log-density of the redundant channels
  log_dets: jax.Array  # [T, B], log|det| of each flow block

  @property
  def informative(self):
    """Log-density of the informative channels, [B]."""
    return self.tokens.sum(1)

  @property
  def log_det(self):
    """log|det dz/dx| of the whole flow, [B]."""
    return self.log_dets.sum(0)

  @property
  def total(self):
    """log p(x | c), [B]."""
    return self.informative + self.redundant + self.log_det


def build(settings):
  """The model that a `config.Config` describes."""
  data = settings.data
  return Farmer(data.image_size, data.channels, data.num_classes, settings.model)


def init_params(key, *, model):
  """Fresh parameters of a `Farmer`."""
  return nn.unbox(init_named_params(key, model=model))


def init_named_params(key, *, model):
  """Fresh parameters in boxes that hold the logical names of their axes too."""
  images = jnp.zeros((1, model.image_size, model.image_size, model.channels))
  return model.init(key, images, jnp.zeros((1,), jnp.int32))['params']


def with_names(params, model):
  """The parameters of a `Farmer` in boxes that hold the logical names of their axes."""
  init = functools.partial(init_named_params, model=model)
  boxes = jax.eval_shape(init, jax.random.key(0))

  def is_box(node):
    return isinstance(node, nn.meta.AxisMetadata)

  return jax.tree.map(lambda box, a: box.replace_boxed(a), boxes, params, is_leaf=is_box)


class Farmer(nn.Module):
  """Images [B, H, W, C], scaled to [-1, 1] and noised, and labels; label num_classes is "no
  class"."""

  image_size: int
  channels: int  # C
  num_classes: int
  settings: config.Model

  def setup(self):
    s, f, p = self.settings, self.settings.flow, self.settings.prior
    dtype = jnp.dtype(s.dtype)
    d = self.channels * s.patch_size**2
    shared: dict[str, Any] = dict(
      tokens=self.tokens,
      channels=d,
      dtype=dtype,
    )
    depth: dict[str, Any] = dict(remat=s.remat, unroll=s.scan_unroll)
    if f.blocks:
      both = functools.partial(
        flow.Flow,
        blocks=f.blocks,
        layers=f.layers,
        width=f.width,
        head_dim=f.head_dim,
        mlp_ratio=f.mlp_ratio,
        num_classes=self.num_classes if f.class_conditional else 0,
        final_permutation=f.final_permutation,
        max_log_scale=f.max_log_scale,
        **shared,
        **depth,
      )
      self.flow = both()
      # The same shapes, weights of its own: those of a model that was distilled have them.
      self.student = both(causal=False)
    self.prior: nn.Module
    if p.kind == 'normal':
      self.prior = prior.NormalPrior(**shared)
    else:
      self.prior = prior.Prior(
        layers=p.layers,
        width=p.width,
        head_dim=p.head_dim,
        mlp_ratio=p.mlp_ratio,
        num_classes=self.num_classes,
        condition_copies=p.condition_copies,
        components=p.components,
        informative_channels=p.informative_channels or d,
        redundant=p.redundant,
        redundant_components=p.redundant_components,
        scale_floor=p.scale_floor,
        **shared,
        **depth,
      )

  @property
  def tokens(self):
    """Patches an image, N."""
    return (self.image_size // self.settings.patch_size) ** 2

  def __call__(self, images, labels):  # [B, H, W, C], int [B]
    """The terms of the exact log-density, a `LogDensity`."""
    z, log_dets = self.encode(images, labels)
    return self.log_density(z, log_dets, labels)

  def log_density(self, z, log_dets, labels):  # [B, N, d], [T, B], int [B]
    """The `LogDensity` of images of which `encode` makes `z` and `log_dets`."""
    tokens, redundant = self.prior(z, labels)
    flow = self.settings.flow
    # Each block has turned the order of the tokens round; the last turn may have been taken back.
    turns = flow.blocks - (flow.blocks > 0 and not flow.final_permutation)
    return LogDensity(tokens[:, ::-1] if turns % 2 else tokens, redundant, log_dets)

  def encode(self, images, labels):  # [B, H, W, C], int [B]
    """Images to latents z [B, N, d], and log|det| of each block [T, B]."""
    z = self._tokens(images)
    if not self.settings.flow.blocks:
      return z, jnp.zeros((0, z.shape[0]), z.dtype)
    return self.flow(z, labels)

  def _tokens(self, images):
    """[B, N, d], float32 at least, whatever the transformers compute in."""
    wide = transformer.param_dtype(jnp.dtype(self.settings.dtype))
    return patches.patchify(images.astype(wide), self.settings.patch_size)

  def decode(self, z, labels, chunks=None, tolerance=0.0):  # [B, N, d], int [B]
    """Latents to images, the inverse of `encode`; exact, unless `chunks` of many tokens are found
    together to within a tolerance (see `flow.Flow.inverse`).

    Returns [B, H, W, C] and the `flow.Convergence` of each block, [T, B].
    """
    report = flow.Convergence(*(jnp.zeros((0, len(z)), z.dtype) for _ in range(2)))
    if self.settings.flow.blocks:
      z, report = self.flow.inverse(z, labels, chunks, tolerance)
    return self.to_images(z), report

  def decode_by_student(self, z, labels, tolerance=0.0, rounds=0):  # [B, N, d], int [B]
    """Latents to images by a student of the flow: see `flow.Flow.inverse_from_guesses`."""
    stage = self.last_stage(z)
    z, report = self.flow.inverse_from_guesses(self.student, stage, labels, tolerance, rounds)
    return self.to_images(z), report

  def stages(self, images, labels):  # [B, H, W, C], int [B]
    """What passes between the flow blocks, [T + 1, B, N, d]: see `flow.Flow.stages`."""
    return self.flow.stages(self._tokens(images), labels)

  def ranges(self, images, labels):  # [B, H, W, C], int [B]
    """The lowest and the highest of what may run away, in the natural logarithm: of each flow
    block's σ [T, 2], and of the scales of the mixtures, informative and redundant ([2] each, where
    there are such)."""
    found = {}
    if self.settings.flow.blocks:
      found['flow_log_scale'] = self.flow.log_scale_ranges(self._tokens(images), labels)
    if self.settings.prior.kind == 'mixture':
      z, _ = self.encode(images, labels)
      informative = z[..., : self.prior.informative_channels]
      mixtures = self.prior.mixtures(informative, labels)
      for name, mixture in zip(('informative', 'redundant'), mixtures, strict=True):
        if mixture is not None:
          scales = mixture.log_scales
          found[f'{name}_log_scale'] = jnp.stack([scales.min(), scales.max()])
    return found

  def guess_stages(self, last, labels):  # [B, N, d], int [B]
    """The student's guesses of `stages` from the last one: see `flow.Flow.guess`."""
    return self.student.guess(last, labels)

  def last_stage(self, z):  # [B, N, d]
    """The last of the `stages`, which the prior may see with its tokens turned round."""
    return z if self.settings.flow.final_permutation else z[:, ::-1]

  def decode_block(self, z, labels, block, chunk=1, tolerance=0.0):
    """Undoes one flow block alone: see `flow.Flow.inverse_block`."""
    return self.flow.inverse_block(z, labels, block, chunk, tolerance)

  def to_images(self, tokens):  # [B, N, d]
    """Tokens in raster order as images [B, H, W, C]."""
    return patches.unpatchify(tokens, self.settings.patch_size, self.image_size)

  def sample_latents(self, labels, draws):  # int [S, B]
    """Draws z [B, N, d] from the prior: see `prior.Prior.sample`."""
    return self.prior.sample(labels, draws)
