"""FARMER: a flow and a prior that define an exact density of images (arXiv 2510.23588)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from farmer_jax import config as config_lib
from farmer_jax.nn import coupling, flow, layers, prior, transformer
from farmer_jax.ops import guidance, patches
from farmer_jax.ops.arrays import Index, Labels, PerBlock, PerImage, PerToken, Tokens, Values

_FLOW_CLASSES = {'autoregressive': flow.Flow, 'coupling': coupling.CouplingFlow}


@flax.struct.dataclass
class LogDensity:
  """The terms of log p(x | c) in nats."""

  tokens: PerToken  # informative channels of each token, in raster order
  redundant: PerImage  # redundant channels of all tokens
  log_dets: PerBlock  # log|det| of each flow block

  @property
  def informative(self) -> PerImage:
    return self.tokens.sum(1)

  @property
  def log_det(self) -> PerImage:  # log|det dz/dx| of the flow
    return self.log_dets.sum(0)

  @property
  def total(self) -> PerImage:  # log p(x | c)
    return self.informative + self.redundant + self.log_det

  def nll_terms(self, dims: int) -> dict[str, PerImage]:
    """Returns the negative log-likelihood and its terms in nats/dim, where `dims` is H·W·C."""
    return {
      'loss': -self.total / dims,
      'nll_informative': -self.informative / dims,
      'nll_redundant': -self.redundant / dims,
      'log_det': -self.log_det / dims,
    }


class Farmer(nn.Module):
  """The density of square images that are scaled to [-1, 1] and contain added noise.

  Label `num_classes` means "no class".
  """

  image_size: int
  channels: int
  num_classes: int
  config: config_lib.Model

  def setup(self) -> None:
    if self.config.flow.blocks:
      self.flow = self._make_flow(_FLOW_CLASSES[self.config.flow.kind])
    self.prior = self._make_prior()

  def _make_flow(
    self, flow_class: type[flow.Flow], section: config_lib.Flow | None = None, **fields: Any
  ) -> flow.Flow:
    section = section or self.config.flow
    stack = transformer.StackConfig.create(section, self.config)
    sizes = self.num_tokens, self.token_channels, self.num_classes
    return flow_class(section, stack, *sizes, **fields)

  def _make_prior(self) -> prior.Prior | prior.NormalPrior:
    section = self.config.prior
    if section.kind == 'normal':
      dtype = jnp.dtype(self.config.dtype)
      return prior.NormalPrior(self.num_tokens, self.token_channels, dtype)
    stack = transformer.StackConfig.create(section, self.config)
    return prior.Prior(section, stack, self.num_tokens, self.token_channels, self.num_classes)

  @property
  def num_tokens(self) -> int:
    return self.config.num_tokens(self.image_size)

  @property
  def token_channels(self) -> int:
    return self.config.token_channels(self.channels)

  def __call__(self, images: Values, labels: Labels) -> LogDensity:
    """Returns the exact log-density of images."""
    z, log_dets = self.encode(images, labels)
    return self.log_density(z, log_dets, labels)

  def encode(self, images: Values, labels: Labels) -> tuple[Tokens, PerBlock]:
    """Maps images to latents z. Also returns log|det| of each flow block."""
    x = self.images_to_tokens(images)
    if not self.config.flow.blocks:
      return x, jnp.zeros((0, len(x)), x.dtype)
    return self.flow(x, labels)

  def decode(
    self,
    z: Tokens,
    labels: Labels,
    chunk_sizes: Sequence[int] | None = None,
    tolerance: float = 0.0,
  ) -> tuple[Values, flow.Convergence]:
    """Maps latents to images, the inverse of `encode`. See `flow.Flow.inverse`."""
    if not self.config.flow.blocks:
      nothing = jnp.zeros((0, len(z)), z.dtype)
      return self.tokens_to_images(z), flow.Convergence(nothing, nothing)
    x, convergence = self.flow.inverse(z, labels, chunk_sizes, tolerance)
    return self.tokens_to_images(x), convergence

  def log_density(self, z: Tokens, log_dets: PerBlock, labels: Labels) -> LogDensity:
    """Computes the log-density of images from the outputs of `encode`."""
    tokens, redundant = self.prior(z, labels)
    is_reversed = self.config.flow.blocks > 0 and self.flow.reversals % 2 == 1
    return LogDensity(tokens[:, ::-1] if is_reversed else tokens, redundant, log_dets)

  def sample(
    self, labels: Int[Array, 'S B'], draws: guidance.GuidedDraws
  ) -> tuple[Tokens, guidance.EffectiveSizes]:
    """Draws latents from the prior. See `prior.Prior.sample`."""
    if self.config.prior.kind == 'normal':
      return self.prior.sample(labels, draws)
    z = jax.ShapeDtypeStruct((1, self.num_tokens, self.token_channels), jnp.float32)
    bound = layers.bind_for_decoding(
      self.prior.clone(parent=None),
      self.prior.variables['params'],
      *(z, jax.ShapeDtypeStruct((1,), jnp.int32)),
      # One vector per image reads this large head once. See `layers.OutputProjection`.
      sharded=('redundant_head',),
    )
    return bound.sample(labels, draws)

  def invert_block(
    self, z: Tokens, labels: Labels, block: Index, chunk_size: int = 1, tolerance: float = 0.0
  ) -> tuple[Tokens, flow.Convergence]:
    """Maps the output of flow block index `block` to its input. See `flow.FlowBlock.inverse`."""
    params = jax.tree.map(lambda a: a[block], self.flow.block_params)
    condition = self.flow.condition(labels)
    return self.flow.invert_block(z, params, condition, chunk_size, tolerance)

  def final_flow_output(self, z: Tokens) -> Tokens:
    """Returns the output of the last flow block for latents z. See `flow.Flow.final_output`."""
    return self._unbound_flow.final_output(z)

  def flow_output_in_order(self, z: Tokens, blocks: int) -> Tokens:
    """Returns the output of the first `blocks` flow blocks in the order of image tokens."""
    return self._unbound_flow.in_order(z, blocks)

  @property
  def _unbound_flow(self) -> flow.Flow:
    """A flow without parameters, for methods that only reorder."""
    return self._make_flow(_FLOW_CLASSES[self.config.flow.kind], parent=None)

  @property
  def _basis(self) -> Float[Array, 'd d']:
    return jnp.asarray(patches.dct_basis(self.config.patch_size, self.channels))

  def images_to_tokens(self, images: Values) -> Tokens:
    """Converts images to tokens in raster order, in float32 or float64."""
    wide = layers.param_dtype(self.config.dtype)
    tokens = patches.patchify(images.astype(wide), self.config.patch_size)
    if self.config.patch_basis == 'pixels':
      return tokens
    return layers.product('bnd,ed->bne', tokens, self._basis.astype(wide))

  def tokens_to_images(self, tokens: Tokens) -> Values:
    """Converts tokens in raster order to images."""
    if self.config.patch_basis == 'dct':
      tokens = layers.product('bne,ed->bnd', tokens, self._basis.astype(tokens.dtype))
    return patches.unpatchify(tokens, self.config.patch_size, self.image_size)


def build(config: config_lib.Config) -> Farmer:
  """Returns the model of a configuration."""
  data = config.data
  return Farmer(data.image_size, data.channels, data.num_classes, config.model)


def init_params(key: PRNGKeyArray, model: Farmer) -> PyTree:
  """Returns initial parameters."""
  return nn.unbox(init_boxed_params(key, model))


def init_boxed_params(key: PRNGKeyArray, model: Farmer) -> PyTree:
  """Returns initial parameters, each in a box with the logical names of its axes."""
  images = jnp.zeros((1, model.image_size, model.image_size, model.channels))
  return model.init(key, images, jnp.zeros((1,), jnp.int32))['params']
