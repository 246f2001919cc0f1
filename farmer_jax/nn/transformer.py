"""A pre-norm transformer, causal or bidirectional, with a full pass and a cached pass.

Axis letters: B batch, N tokens of a sequence, n tokens of a call.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PyTree

from farmer_jax import config as config_lib
from farmer_jax.nn import attention, attention_kernels, layers, scaling
from farmer_jax.ops import patches
from farmer_jax.ops.arrays import Hidden, Index

NewHidden = Float[Array, 'B n width']


@dataclasses.dataclass(frozen=True)
class StackConfig:
  """Settings of a stack of transformer layers."""

  layers: int
  width: int
  head_dim: int
  mlp_width: int
  dtype: jnp.dtype
  remat: str = 'none'  # `none` or a key of `layers.REMAT_POLICIES`
  unroll: int = 1  # layers per iteration of the compiled loop
  attention: attention_kernels.Setting = 'xla'
  in_loop: bool = False  # whether a compiled loop applies the stack
  gated: bool = False  # whether MLPs are gated
  qk_norm: bool = False  # whether queries and keys are normalized
  neighborhood: bool = False  # whether `CausalInputs` contain neighbors

  @classmethod
  def create(
    cls, section: config_lib.Flow | config_lib.Prior, model: config_lib.Model
  ) -> 'StackConfig':
    """Returns the settings for `section`, the flow or the prior of a model."""
    return cls(
      layers=section.layers,
      width=section.width,
      head_dim=section.head_dim,
      mlp_width=model.mlp_width(section),
      dtype=jnp.dtype(model.dtype),
      remat=model.remat,
      unroll=model.scan_unroll or default_unroll(section.layers, model.remat),
      attention=model.attention,
      gated=model.mlp == 'gated',
      qk_norm=model.qk_norm,
      neighborhood=model.neighborhood,
    )


@dataclasses.dataclass(frozen=True)
class CausalInputs:
  """What a causal transformer reads at a token to predict the token after it.

  This is the token alone, or also the three neighbors of the predicted token in the row above.
  """

  row: int  # tokens per row of the image, or 0 without neighbors

  @classmethod
  def create(cls, stack: StackConfig, num_tokens: int) -> 'CausalInputs':
    """Returns the inputs of a transformer for square images of `num_tokens` tokens."""
    return cls(math.isqrt(num_tokens) if stack.neighborhood else 0)

  def pad(self, tokens: Float[Array, 'B n d']) -> Float[Array, 'B M d']:
    """Adds a row of zeros before the first token, so that M = row + n."""
    return jnp.pad(tokens, ((0, 0), (self.row, 0), (0, 0)))

  def read(self, tokens: Float[Array, 'B M d']) -> Float[Array, 'B n inputs']:
    """Returns the inputs at the last n tokens. The tokens before them are neighbors only."""
    return patches.neighborhoods(tokens, self.row) if self.row else tokens


def default_unroll(num_layers: int, remat: str) -> int:
  """Returns `config.model.scan_unroll` for a stack of layers, by the platform.

  XLA's CPU backend copies the stacked arrays of a loop in each iteration, which takes up to a third
  of a step. The TPU compiler reads slices of the parameters in place, and unrolling the layers of a
  block saves 2 % of a step, but compilation takes longer (docs/scaling.md). The CPU backend keeps
  rematerialization in loops only, see `layers.scan_stack`.
  """
  if layers.target_platform() == 'cpu':
    return 16 if remat == 'none' else 1
  return num_layers if num_layers <= 8 else 4


class TransformerLayer(nn.Module):
  """Attention and an MLP, each with a preceding norm and a residual connection.

  The gradient of a bias is a reduction over all activations, which needs separate kernels and adds
  compile time. The dense layers therefore have no biases.
  """

  stack_config: StackConfig
  causal: bool = True

  def setup(self) -> None:
    stack = self.stack_config
    residual_init = scaling.residual_init(stack.layers)
    dense = functools.partial(
      layers.dense, dtype=stack.dtype, use_bias=False, kernel_init=scaling.MATRIX_INIT
    )
    widening, narrowing = ('embed', 'hidden'), ('hidden', 'embed')
    self.attention_norm = layers.norm(stack.dtype)
    self.query, self.key, self.value = (dense(stack.width, axes=widening) for _ in range(3))
    if stack.qk_norm:
      self.query_norm, self.key_norm = (layers.norm(stack.dtype, axis=None) for _ in range(2))
    self.attention_out = dense(stack.width, axes=narrowing, kernel_init=residual_init)
    self.mlp_norm = layers.norm(stack.dtype)
    self.mlp_in = dense(stack.mlp_width, axes=widening)
    if stack.gated:
      self.mlp_gate = dense(stack.mlp_width, axes=widening)
    self.mlp_out = dense(stack.width, axes=narrowing, kernel_init=residual_init)

  def __call__(self, x: Hidden) -> tuple[Hidden, None]:
    """Full pass over sequences. Returns (carry, output) for `nn.scan`."""
    return layers.shard_batch(self.extend(layers.shard_batch(x))[0]), None

  def extend(
    self, x: NewHidden, cache: attention.LayerCache | None = None, position: Index = 0
  ) -> tuple[NewHidden, attention.LayerCache | None]:
    """Processes n tokens at `position`, which also attend to the cached tokens before it.

    Also returns the cache with the n tokens added, or None if there is no cache.
    """
    normed = self.attention_norm(x)
    q, k, v = (
      attention.split_heads(checkpoint_name(projection(normed), 'qkv'), self.stack_config.head_dim)
      for projection in (self.query, self.key, self.value)
    )
    if self.stack_config.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    if cache is not None:
      # XLA would copy the cache at each step if it were read before it is written.
      k, v = cache = attention.update_cache(cache, k, v, position)
    setting = self.stack_config.attention
    attended = attention.attend(q, k, v, self.causal, position, setting)
    x = checkpoint_name(x + self.attention_out(attended), 'attention_out')
    normed = self.mlp_norm(x)
    hidden = checkpoint_name(self.mlp_in(normed), 'mlp_in')
    if self.stack_config.gated:  # SwiGLU (arXiv 2002.05202)
      hidden *= jax.nn.silu(checkpoint_name(self.mlp_gate(normed), 'mlp_in'))
    else:
      hidden = jax.nn.gelu(hidden)
    return x + self.mlp_out(hidden), cache


class Transformer(nn.Module):
  """A stack of layers without a final norm.

  The residual connections are a linear path from the inputs to the outputs. Shifts and means use
  this path, because the best prediction of a token from other tokens is nearly linear. A norm would
  make the path nonlinear (docs/recipe.md, "Output projections").
  """

  stack_config: StackConfig
  causal: bool = True

  def setup(self) -> None:
    stack = self.stack_config
    fields: dict[str, Any] = dict(stack_config=stack, causal=self.causal)
    scanned = layers.scan_stack(
      TransformerLayer,
      stack.layers,
      stack.unroll,
      stack.remat,
      in_axes=(),
      name='layers',
      in_loop=stack.in_loop,
    )
    self.stack = scanned(**fields)
    self.one_layer = TransformerLayer(**fields, parent=None)

  def __call__(self, x: Hidden) -> Hidden:
    return self.stack(x)[0]

  def extend(
    self,
    x: NewHidden,
    layer_params: list[PyTree],
    cache: attention.Cache | None = None,
    position: Index = 0,
  ) -> tuple[NewHidden, attention.Cache | None]:
    """Applies `TransformerLayer.extend` in all layers, with the output of `layer_params()`."""
    caches: list[Any] = []
    for params, old in zip(layer_params, cache or (None,) * len(layer_params), strict=True):
      x, new = self.one_layer.apply({'params': params}, x, old, position, method='extend')
      caches.append(new)
    return x, None if cache is None else tuple(caches)

  def init_cache(self, batch: int, length: int) -> attention.Cache:
    """Returns a cache of zeros for `length` tokens."""
    stack = self.stack_config
    shape = batch, stack.width // stack.head_dim, length, stack.head_dim
    empty = jnp.zeros(shape, stack.dtype)
    return ((empty, empty),) * stack.layers

  def layer_params(self) -> list[PyTree]:
    """Returns the parameters of each layer, for `extend`.

    Call this method outside the loop over tokens. Otherwise, XLA copies the parameters per token.
    """
    stacked = self.stack.variables['params']
    return [
      jax.tree.map(lambda a, i=layer: a[i], stacked) for layer in range(self.stack_config.layers)
    ]
