"""FARMER: the flow and the prior together, an exact density over images (arXiv 2510.23588)."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from farmer_jax import config
from farmer_jax.nn import flow, prior
from farmer_jax.ops import patches


@flax.struct.dataclass
class LogDensity:
  """The terms of log p(x | c), in nats, an entry an image."""

  informative: jax.Array  # [B], log-density of the informative channels
  redundant: jax.Array  # [B], log-density of the redundant channels
  log_dets: jax.Array  # [T, B], log|det| of each flow block

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
      tokens=(self.image_size // s.patch_size) ** 2,
      channels=d,
      dtype=dtype,
    )
    depth: dict[str, Any] = dict(remat=s.remat, unroll=s.scan_unroll)
    if f.blocks:
      self.flow = flow.Flow(
        blocks=f.blocks,
        layers=f.layers,
        width=f.width,
        head_dim=f.head_dim,
        mlp_ratio=f.mlp_ratio,
        num_classes=self.num_classes if f.class_conditional else 0,
        final_permutation=f.final_permutation,
        **shared,
        **depth,
      )
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

  def __call__(self, images, labels):  # [B, H, W, C], int [B]
    """The terms of the exact log-density, a `LogDensity`."""
    z, log_dets = self.encode(images, labels)
    informative, redundant = self.prior(z, labels)
    return LogDensity(informative, redundant, log_dets)

  def encode(self, images, labels):  # [B, H, W, C], int [B]
    """Images to latents z [B, N, d], and log|det| of each block [T, B]."""
    z = patches.patchify(images, self.settings.patch_size)
    if not self.settings.flow.blocks:
      return z, jnp.zeros((0, z.shape[0]), z.dtype)
    return self.flow(z, labels)

  def decode(self, z, labels):  # [B, N, d], int [B]
    """Latents to images, the exact inverse of `encode`; returns [B, H, W, C]."""
    if self.settings.flow.blocks:
      z = self.flow.inverse(z, labels)
    return patches.unpatchify(z, self.settings.patch_size, self.image_size)

  def sample(self, key, labels):  # int [B]
    """Draws images [B, H, W, C] on the scale of the training data."""
    return self.decode(self.prior.sample(key, labels), labels)
