"""The autoregressive flow: an invertible map between patch tokens and latent tokens.

`nn/coupling.py` has the flow of affine couplings.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from farmer_jax import config
from farmer_jax.nn import attention, layers, scaling, transformer
from farmer_jax.ops import affine, fixed_point
from farmer_jax.ops.arrays import Condition, Labels, PerBlock, PerImage, Tokens

# In longer sequences, causal blocks keep the last token, see `FlowBlock._hidden`.
_MAX_CUT_TOKENS = 128

Maps = Float[Array, 'B N outputs']  # shifts or log-scales of the affine maps of a block


@flax.struct.dataclass
class Convergence:
  """Convergence statistics of the inverse of a flow block, per image."""

  residual: Float[Array, '*T B']  # largest change in the last round, relative to 1 + |x|; 0: exact
  passes: Float[Array, '*T B']  # passes over all tokens


class AffineBlock(nn.Module):
  """What all flow blocks share: a transformer computes shifts and log-scales of an affine map.

  Output projections start at zero: the map of a new block is the identity.
  """

  flow: config.Flow
  stack_config: transformer.StackConfig
  num_tokens: int
  channels: int
  causal: bool = True

  def _make_layers(self, num_positions: int, num_outputs: int) -> None:
    """Makes the layers, for `num_positions` tokens and maps of `num_outputs` channels."""
    stack = self.stack_config
    self.in_proj = layers.dense(stack.width, stack.dtype, (None, 'embed'), scaling.MATRIX_INIT)
    self.positions = self.param(
      'positions',
      layers.logical_axes(scaling.EMBEDDING_INIT, None, 'embed'),
      (num_positions, stack.width),
      layers.param_dtype(stack.dtype),
    )
    self.transformer = transformer.Transformer(stack, self.causal)
    zeros = nn.initializers.zeros
    self.shift_proj = layers.OutputProjection(num_outputs, stack.dtype, zeros)
    self.norm = layers.norm(stack.dtype)
    self.log_scale_proj = layers.OutputProjection(num_outputs, stack.dtype, zeros)

  def affine_parameters(
    self, x: Tokens, condition: Condition
  ) -> tuple[Maps, Maps, Float[Array, 'B n width']]:
    """Returns shift, log-scale, and the outputs of the transformer."""
    hidden = self._hidden(x, condition)
    return *self._shift_and_log_scale(hidden), hidden

  def _hidden(self, x: Tokens, condition: Condition) -> Float[Array, 'B n width']:
    """Returns the outputs of the transformer."""
    return self.transformer(self._embed(x, condition, self.positions))

  def _transform(
    self, function: Callable[[Tokens, Tokens, Tokens], Any], hidden: Array, values: Array
  ) -> Any:
    """Returns `function(values, shift, log_scale)` for outputs of the transformer.

    With rematerialization, the backward pass recomputes everything that follows the transformer.
    """

    def finish(block: 'AffineBlock', hidden: Array, values: Array) -> Any:
      return function(values, *block._shift_and_log_scale(hidden))

    if self.stack_config.remat != 'none':
      finish = nn.remat(finish, prevent_cse=not self.stack_config.in_loop)
    return finish(self, hidden, values)

  def _embed(self, x: Array, condition: Array | None, positions: Array) -> Array:
    """Returns the inputs [B, n, width] of the transformer for tokens [B, n, d]."""
    hidden = self.in_proj(x) + positions.astype(self.stack_config.dtype)
    return hidden if condition is None else hidden + condition[:, None]

  def _shift_and_log_scale(self, hidden: Array) -> tuple[Maps, Maps]:
    """Returns shift and log-scale of the map, for outputs of the transformer."""
    return self._project(hidden)

  def _project(self, hidden: Array) -> tuple[Array, Array]:
    """Returns shift and log-scale, [B, n, outputs] each."""
    # Without the norm, a large token could make the scale of another token exponentially large.
    log_scale = self.log_scale_proj(self.norm(hidden))
    return self.shift_proj(hidden), affine.bound_log_scale(log_scale, self.flow.max_log_scale)


class FlowBlock(AffineBlock):
  """One autoregressive affine map (arXiv 2412.06329, 2510.23588).

  A causal transformer computes shift and log-scale of token i from the tokens before token i. The
  first token does not change. The block reverses the token order, so that the next block reads the
  tokens in the other direction.
  """

  def setup(self) -> None:
    self._make_layers(self.num_tokens - 1, self.channels)

  @property
  def causal_inputs(self) -> transformer.CausalInputs:
    """What the transformer reads. That of a student reads all tokens, so it needs no neighbors."""
    if not self.causal:
      return transformer.CausalInputs(0)
    return transformer.CausalInputs.create(self.stack_config, self.num_tokens)

  def __call__(self, x: Tokens, condition: Condition) -> tuple[Tokens, PerImage]:
    """Returns z_i = (x_i - shift_i) / scale_i in reversed order, and log|det dz/dx| in nats."""
    (z, log_det), _ = self.map_tokens(affine.affine_forward, x, condition)
    return layers.shard_batch(z[:, ::-1]), log_det

  def inverse(
    self,
    z: Tokens,
    condition: Condition,
    chunk_size: int,
    tolerance: float,
    start: Tokens | None = None,
    max_rounds: int | None = None,
  ) -> tuple[Tokens, Convergence]:
    """Inverts `__call__` chunk by chunk, with a key/value cache.

    The tokens of a chunk are computed together by Jacobi iteration, see `fixed_point.solve`. A
    chunk size of 1 is the sequential inverse, which is exact. A chunk of all tokens is pure Jacobi
    iteration (arXiv 2505.12849, 2505.24791). It starts at `start`, in the order of x, or at z.
    """
    z = z[:, ::-1]
    start = z if start is None else start
    batch, unknown = len(z), self.num_tokens - 1  # x_1 = z_1 is known
    chunk_size = min(chunk_size, unknown)
    num_chunks = -(-unknown // chunk_size)
    layer_params = self.transformer.layer_params()

    def solve_chunk(carry: Any, inputs: Any) -> Any:
      # The tokens before the chunk that its inputs contain; the cache of all earlier tokens.
      past, cache = carry
      z, x, positions, is_token, first = inputs

      def update(x: Array, cache: Any) -> tuple[Array, Any]:
        inputs = self.causal_inputs.read(jnp.concatenate([past, x[:, :-1]], axis=1))
        hidden = self._embed(inputs, condition, positions)
        hidden, cache = self.transformer.extend(hidden, layer_params, cache, first)
        x = affine.affine_inverse(z, *self._project(hidden))
        return jnp.where(is_token, x, 0), cache

      solution = fixed_point.solve(update, x, cache, tolerance, max_rounds)
      past = jnp.concatenate([past, solution.x], axis=1)[:, -past.shape[1] :]
      return (past, solution.aux), (solution.x, solution.residual, solution.rounds)

    is_token = jnp.ones((unknown, 1), bool)  # False for the padding of the last chunk
    chunked = [
      _split_chunks(a, chunk_size) for a in (z[:, 1:], start[:, 1:], self.positions, is_token)
    ]
    cache = self.transformer.init_cache(batch, 0) if num_chunks > 1 else None
    chunks = (*chunked, chunk_size * jnp.arange(num_chunks))
    past = self.causal_inputs.pad(z[:, :1])
    _, (x, residual, rounds) = attention.scan_with_cache(
      solve_chunk, past, cache, chunks, chunk_size
    )
    x = jnp.moveaxis(x, 0, 1).reshape(batch, num_chunks * chunk_size, -1)[:, :unknown]
    # A round is one pass over one chunk. The mean over chunks is in passes over all tokens.
    passes = rounds.astype(x.dtype).mean(0)
    return jnp.concatenate([z[:, :1], x], axis=1), Convergence(residual.max(0), passes)

  def map_tokens(
    self, function: Callable[[Tokens, Tokens, Tokens], Any], x: Tokens, condition: Condition
  ) -> tuple[Any, Float[Array, 'B N-1 width']]:
    """Returns `function(x, shift, log_scale)` and the outputs of the transformer.

    Output i affects token i + 1 of x.
    """
    hidden = self._hidden(x, condition)
    return self._transform(function, hidden, x), hidden[:, : self.num_tokens - 1]

  def _hidden(self, x: Tokens, condition: Condition) -> Float[Array, 'B n width']:
    """Returns the outputs of the transformer, of all tokens or of all tokens except the last."""
    unknown = self.num_tokens - 1
    # No token depends on the last token, so the transformer does not need it. Long causal sequences
    # keep it, with a zero position embedding, because TPU arrays are tiled in 8 rows and lengths
    # such as 255 cause repeated copies. In short sequences the token costs more than the copies.
    n = self.num_tokens if self.causal and self.num_tokens > _MAX_CUT_TOKENS else unknown
    positions = jnp.pad(self.positions, ((0, n - unknown), (0, 0)))
    inputs = self.causal_inputs.read(self.causal_inputs.pad(x[:, :n]))
    return self.transformer(self._embed(inputs, condition, positions))

  def _shift_and_log_scale(self, hidden: Float[Array, 'B n width']) -> tuple[Tokens, Tokens]:
    """Returns shift and log-scale of all tokens. They are zero for the first token.

    The outputs at token i affect token i + 1.
    """
    unknown = self.num_tokens - 1
    shift, log_scale = (
      jnp.pad(a[:, :unknown], ((0, 0), (1, 0), (0, 0))) for a in self._project(hidden)
    )
    return shift, log_scale


def _split_chunks(a: Array, chunk_size: int) -> Array:
  """Pads and splits the token axis: [..., n, c] -> [chunks, ..., chunk_size, c]."""
  num_chunks = -(-a.shape[-2] // chunk_size)
  padding = num_chunks * chunk_size - a.shape[-2]
  a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, padding), (0, 0)])
  return jnp.moveaxis(a.reshape(*a.shape[:-2], num_chunks, chunk_size, a.shape[-1]), -3, 0)


class Flow(nn.Module):
  """T flow blocks.

  The reversal of the last block is the final permutation of the paper. Because of it, the prior
  reads the tokens in the opposite direction from the last block.
  `config.Flow.final_permutation=False` undoes this last reversal.
  """

  flow: config.Flow
  stack_config: transformer.StackConfig
  num_tokens: int
  channels: int
  num_classes: int  # label num_classes means "no class"

  block_class: ClassVar[type[AffineBlock]] = FlowBlock

  def setup(self) -> None:
    stack = self.stack_config
    # With remat=full, only the inputs of the blocks are stored, and the backward pass holds the
    # activations of one block at a time. For one block, memory suffices for the policy `dots`.
    block_remat = 'dots' if stack.remat == 'full' else stack.remat
    in_loop = self._unroll < self.flow.blocks
    fields: dict[str, Any] = dict(
      flow=self.flow,
      stack_config=dataclasses.replace(stack, remat=block_remat, in_loop=in_loop),
      num_tokens=self.num_tokens,
      channels=self.channels,
    )
    scanned = layers.scan_stack(
      self.block_class,
      self.flow.blocks,
      self._unroll,
      remat='full' if stack.remat == 'full' else 'none',
      in_axes=nn.broadcast,
      name='blocks',
    )
    self.stack = scanned(**fields)
    self.one_block = self.block_class(**fields, parent=None)
    if self.flow.class_conditional:
      self.class_embedding = layers.class_embedding(self.num_classes, stack.width, stack.dtype)

  def __call__(self, x: Tokens, labels: Labels) -> tuple[Tokens, PerBlock]:
    """Maps tokens to latents z. Also returns log|det| of each block in nats."""
    z, log_dets = self.stack(x, self.condition(labels))
    return self.latents(z), log_dets

  def inverse(
    self,
    z: Tokens,
    labels: Labels,
    chunk_sizes: Sequence[int] | None = None,
    tolerance: float = 0.0,
  ) -> tuple[Tokens, Convergence]:
    """Maps latents to tokens. Also returns the convergence statistics of each block, [T, B].

    See `FlowBlock.inverse`. By default all chunk sizes are 1, which gives the exact inverse.
    """
    chunk_sizes = tuple(chunk_sizes or (1,) * self.flow.blocks)
    condition = self.condition(labels)
    z = self.final_output(z)
    results: list[Convergence] = []
    # Consecutive blocks with the same chunk size share a scan, so that compile time grows with the
    # number of changes of the chunk size instead of the number of blocks.
    groups = itertools.groupby(range(self.flow.blocks), chunk_sizes.__getitem__)
    for chunk_size, group in reversed([(size, list(group)) for size, group in groups]):

      def invert(z: Array, params: PyTree, chunk_size: int = chunk_size) -> Any:
        return self.invert_block(z, params, condition, chunk_size, tolerance)

      params = jax.tree.map(lambda a, g=group: a[g[0] : g[-1] + 1], self.block_params)
      z, convergence = jax.lax.scan(invert, z, params, reverse=True)
      results.insert(0, convergence)
    return z, jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)

  @property
  def reversals(self) -> int:
    """Number of reversals of the token order between x and the latents z."""
    return self.flow.blocks - (not self.flow.final_permutation)

  def in_order(self, z: Tokens, blocks: int) -> Tokens:
    """Returns the output of the first `blocks` blocks, reordered like x."""
    return z[:, ::-1] if blocks % 2 else z

  def latents(self, z: Tokens) -> Tokens:
    """Returns the latents for the output of the last block."""
    return z if self.flow.final_permutation else z[:, ::-1]

  def final_output(self, z: Tokens) -> Tokens:
    """Returns the output of the last block for latents z."""
    return self.latents(z)

  @property
  def block_params(self) -> PyTree:
    """Parameters of the blocks, stacked along a leading axis T."""
    return self.stack.variables['params']

  def invert_block(
    self, z: Tokens, params: PyTree, condition: Condition, *args: Any, **kwargs: Any
  ) -> tuple[Tokens, Convergence]:
    """Calls `FlowBlock.inverse` of the block with these parameters."""
    block = layers.bind_for_decoding(self.one_block, params, z, condition)
    return block.inverse(z, condition, *args, **kwargs)

  def bind_block(self, params: PyTree) -> Any:
    """Returns a flow block that is bound to `params`."""
    return self.one_block.bind({'params': params})

  def scan_blocks(
    self,
    step: Callable[[Array, PyTree], tuple[Array, PyTree]],
    z: Tokens,
    params: PyTree | None = None,
    reverse: bool = False,
  ) -> tuple[Tokens, PyTree]:
    """Scans `step(z, params of a block) -> (z, outputs)` over the blocks.

    `params` are stacked parameters, by default `block_params`.
    """
    params = self.block_params if params is None else params
    unroll = min(self._unroll, self.flow.blocks)
    return jax.lax.scan(step, z, params, reverse=reverse, unroll=unroll)

  def condition(self, labels: Labels) -> Condition:
    """Returns the class embeddings, or None if the flow is not class-conditional."""
    return self.class_embedding(labels) if self.flow.class_conditional else None

  @property
  def _unroll(self) -> int:
    """Number of blocks per loop iteration. It exceeds 1 only if all their layers are unrolled."""
    return max(1, self.stack_config.unroll // self.flow.layers)
