"""The autoregressive flow: an invertible map between patch tokens and latent tokens."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from farmer_jax.nn import transformer
from farmer_jax.ops import affine


class FlowBlock(nn.Module):
  """One autoregressive affine map, tokens in the order they come in.

  Token i is shifted and scaled by what a causal transformer makes of the tokens before it; token 1
  stays as it is. A zero-initialised output layer makes the block the identity at initialisation.
  """

  tokens: int  # N
  channels: int  # d
  layers: int
  width: int
  head_dim: int
  mlp_ratio: float
  dtype: jnp.dtype
  unroll: int = 1

  def setup(self):
    self.in_proj = transformer.dense(self.width, self.dtype)
    self.positions = self.param(
      'positions',
      nn.initializers.normal(0.02),
      (self.tokens - 1, self.width),
      transformer.param_dtype(self.dtype),
    )
    self.transformer = transformer.Transformer(
      layers=self.layers,
      width=self.width,
      head_dim=self.head_dim,
      mlp_ratio=self.mlp_ratio,
      dtype=self.dtype,
      unroll=self.unroll,
    )
    self.out_proj = transformer.Readout(
      2 * self.channels, self.dtype, kernel_init=nn.initializers.zeros
    )

  def __call__(self, z, condition):  # [B, N, d], [B, width] or None
    """Maps data towards latents; returns [B, N, d] in reversed token order and log|det| [B]."""
    hidden = self.transformer(self._embed(z[:, :-1], condition, self.positions))
    # What is read off token i - 1 acts on token i; nothing acts on the first.
    shift, log_scale = (jnp.pad(a, ((0, 0), (1, 0), (0, 0))) for a in self._affine(hidden))
    z, log_det = affine.affine_forward(z, shift, log_scale)
    return z[:, ::-1], log_det

  def inverse(self, z, condition):  # [B, N, d] in reversed token order, [B, width] or None
    """Undoes `__call__` token by token, with a key/value cache; returns [B, N, d]."""
    z = z[:, ::-1]
    cache = self.transformer.init_cache(z.shape[0], self.tokens - 1)

    def next_token(carry, inputs):
      previous, cache = carry
      z_i, position, embedding = inputs
      hidden = self._embed(previous, condition, embedding)
      hidden, cache = self.transformer.step(hidden, cache, position)
      x_i = affine.affine_inverse(z_i, *self._affine(hidden))
      return (x_i, cache), x_i

    inputs = (z[:, 1:].swapaxes(0, 1), jnp.arange(self.tokens - 1), self.positions)
    _, x = jax.lax.scan(next_token, (z[:, 0], cache), inputs)  # x [N - 1, B, d]
    return jnp.concatenate([z[:, :1], x.swapaxes(0, 1)], axis=1)

  def _embed(self, z, condition, positions):  # z [B, n, d] or [B, d]
    hidden = self.in_proj(z) + positions.astype(self.dtype)
    if condition is not None:
      hidden += condition if hidden.ndim == 2 else condition[:, None]
    return hidden

  def _affine(self, hidden):
    """Shift and log-scale, [..., d] each."""
    return jnp.split(self.out_proj(hidden), 2, axis=-1)


class Flow(nn.Module):
  """T flow blocks; the token order turns round after each, so that all are identical in shape.

  The last turn is the paper's final permutation: it stands between the last block and the prior,
  which counts as one more autoregressive block. `final_permutation=False` takes it back.
  """

  blocks: int  # T
  tokens: int
  channels: int
  layers: int
  width: int
  head_dim: int
  mlp_ratio: float
  dtype: jnp.dtype
  num_classes: int = 0  # above 0 the flow sees the class; class num_classes means "no class"
  final_permutation: bool = True
  remat: str = 'none'
  unroll: int = 1

  def setup(self):
    settings: dict[str, Any] = dict(
      tokens=self.tokens,
      channels=self.channels,
      layers=self.layers,
      width=self.width,
      head_dim=self.head_dim,
      mlp_ratio=self.mlp_ratio,
      dtype=self.dtype,
      unroll=self.unroll,
    )
    stack = transformer.scan_stack(
      FlowBlock, self.blocks, self.unroll, self.remat, nn.broadcast, 'blocks'
    )
    self.stack = stack(**settings)
    self.one_block = FlowBlock(**settings, parent=None)
    if self.num_classes:
      self.class_embedding = nn.Embed(
        self.num_classes + 1,
        self.width,
        dtype=self.dtype,
        param_dtype=transformer.param_dtype(self.dtype),
      )

  def __call__(self, x, labels):  # [B, N, d], int [B]
    """Maps data to latents; returns z [B, N, d] and log|det| of each block [T, B], nats."""
    z, log_dets = self.stack(x, self._condition(labels))
    return (z if self.final_permutation else z[:, ::-1]), log_dets

  def inverse(self, z, labels):  # [B, N, d], int [B]
    """Maps latents to data, exactly, one token after the other in each block; returns [B, N, d]."""
    condition = self._condition(labels)
    z = z if self.final_permutation else z[:, ::-1]

    def undo_block(z, params):
      return self.one_block.apply({'params': params}, z, condition, method='inverse'), None

    return jax.lax.scan(undo_block, z, self.stack.variables['params'], reverse=True)[0]

  def _condition(self, labels):
    return self.class_embedding(labels) if self.num_classes else None
