"""The autoregressive flow: an invertible map between patch tokens and latent tokens."""

import itertools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from farmer_jax.nn import transformer
from farmer_jax.ops import affine, fixed_point

# Sequences of more tokens than this are not cut short by their last one, see `_affine_of`.
_LONG = 128


@flax.struct.dataclass
class Convergence:
  """How the inverse of a block ended, an entry an image."""

  residual: jax.Array  # largest change in the last round, relative to 1 + |x|; 0: exact
  passes: jax.Array  # passes over all tokens


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
  max_log_scale: float = 0.0  # smooth upper bound of log σ; 0: none
  causal: bool = True  # False: a student, which has `guess` alone
  remat: str = 'none'
  unroll: int = 1

  def setup(self):
    self.in_proj = transformer.dense(self.width, self.dtype, axes=(None, 'embed'))
    self.positions = self.param(
      'positions',
      transformer.named(nn.initializers.normal(0.02), None, 'embed'),
      (self.tokens - 1, self.width),
      transformer.param_dtype(self.dtype),
    )
    self.transformer = transformer.Transformer(
      layers=self.layers,
      width=self.width,
      head_dim=self.head_dim,
      mlp_ratio=self.mlp_ratio,
      dtype=self.dtype,
      causal=self.causal,
      remat=self.remat,
      unroll=self.unroll,
    )
    self.out_proj = transformer.Readout(
      2 * self.channels, self.dtype, kernel_init=nn.initializers.zeros
    )

  def __call__(self, z, condition):  # [B, N, d], [B, width] or None
    """Maps data towards latents; returns [B, N, d] in reversed token order and log|det| [B]."""
    z, log_det = affine.affine_forward(z, *self._affine_of(z, condition)[0])
    return transformer.split_batch(z[:, ::-1]), log_det

  def guess(self, z, condition, context=None):
    """Undoes `__call__` in one pass over all tokens (arXiv 2510.23588, one-step distillation).

    Shift and scale come from the tokens at hand instead of from those to be found: as good as the
    weights have been trained for that. With the true result as `context` the causal block that made
    z undoes it exactly.

    Args:
      z: [B, N, d] in reversed token order.
      condition: [B, width] or None.
      context: [B, N, d] in the order of the result; by default the tokens of z.

    Returns:
      [B, N, d], and the hidden states [B, N - 1, width] of which number i acts on token i + 1.
    """
    z = z[:, ::-1]
    (shift, log_scale), hidden = self._affine_of(z if context is None else context, condition)
    return affine.affine_inverse(z, shift, log_scale), hidden

  def log_scale_range(self, z, condition):
    """`__call__`'s first result, and the lowest and the highest log σ in it."""
    shift, log_scale = self._affine_of(z, condition)[0]
    z, _ = affine.affine_forward(z, shift, log_scale)
    return z[:, ::-1], jnp.stack([log_scale.min(), log_scale.max()])

  def inverse(self, z, condition, chunk, tolerance, start=None, rounds=None):
    """Undoes `__call__`, `chunk` tokens at a time, with a key/value cache.

    The tokens of a chunk are found together by Jacobi iteration, the chunks one after the other
    (Gauss-Seidel). Chunks of one token make the sequential inverse, one chunk of all tokens pure
    Jacobi (arXiv 2505.12849, 2505.24791).

    Args:
      z: [B, N, d] in reversed token order.
      condition: [B, width] or None.
      chunk: tokens found together, above 0.
      tolerance: as `fixed_point.solve` takes it.
      start: [B, N, d], where the iteration starts; by default at z.
      rounds: as `fixed_point.solve` takes it.

    Returns:
      [B, N, d] and the `Convergence`.
    """
    z = z[:, ::-1]
    start = z if start is None else start
    batch, unknown = len(z), self.tokens - 1
    chunk = min(chunk, unknown)
    chunks = -(-unknown // chunk)
    padding = chunks * chunk - unknown

    def in_chunks(a):  # [..., N - 1, c] -> [chunks, ..., chunk, c]
      a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, padding), (0, 0)])
      return jnp.moveaxis(a.reshape(*a.shape[:-2], chunks, chunk, a.shape[-1]), -3, 0)

    def find_chunk(carry, inputs):
      first, cache = carry  # the token before the chunk, and the keys and values before that
      z, x, embeddings, real, position = inputs

      def update(x, cache):
        previous = jnp.concatenate([first[:, None], x[:, :-1]], axis=1)
        hidden = self._embed(previous, condition, embeddings)
        hidden, cache = self.transformer.extend(hidden, layers, cache, position)
        x = affine.affine_inverse(z, *self._affine(hidden))
        return jnp.where(real, x, 0), cache

      found = fixed_point.solve(update, x, cache, tolerance, rounds)
      return (found.x[:, -1], found.aux), (found.x, found.residual, found.rounds)

    layers = self.transformer.unstacked()
    cache = self.transformer.init_cache(batch, 0) if chunks > 1 else None
    real = jnp.ones((unknown, 1), bool)  # not padding
    inputs = map(in_chunks, (z[:, 1:], start[:, 1:], self.positions, real))
    _, (x, residual, done) = transformer.scan_tokens(
      find_chunk, z[:, 0], cache, (*inputs, chunk * jnp.arange(chunks)), chunk
    )
    x = jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk, -1)[:, :unknown]
    # A round costs a pass over a chunk; so many passes over all tokens is what they come to.
    passes = done.astype(x.dtype).mean(0)
    return jnp.concatenate([z[:, :1], x], axis=1), Convergence(residual.max(0), passes)

  def _affine_of(self, x, condition):  # [B, N, d]
    """Shift and log-scale of all tokens, given the tokens of x; and the hidden states."""
    unknown = self.tokens - 1
    # The last token acts on none. Causal transformers may see it all the same, at the end: arrays
    # of 255 tokens are taken apart and put together again all the time on TPUs, where memory comes
    # in rows of eight. In a short sequence it would cost more than it saves.
    seen = self.tokens if self.causal and self.tokens > _LONG else unknown
    positions = jnp.pad(self.positions, ((0, seen - unknown), (0, 0)))
    hidden = self.transformer(self._embed(x[:, :seen], condition, positions))
    # What is read off token i - 1 acts on token i; nothing acts on the first.
    acting = [jnp.pad(a[:, :unknown], ((0, 0), (1, 0), (0, 0))) for a in self._affine(hidden)]
    return acting, hidden[:, :unknown]

  def _embed(self, z, condition, positions):  # z [B, n, d]
    hidden = self.in_proj(z) + positions.astype(self.dtype)
    return hidden if condition is None else hidden + condition[:, None]

  def _affine(self, hidden):
    """Shift and log-scale, [..., d] each."""
    shift, log_scale = jnp.split(self.out_proj(hidden), 2, axis=-1)
    return shift, affine.bounded(log_scale, self.max_log_scale)


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
  max_log_scale: float = 0.0
  causal: bool = True
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
      max_log_scale=self.max_log_scale,
      causal=self.causal,
      # Of one block at a time there is room for more.
      remat='dots' if self.remat == 'full' else self.remat,
      unroll=self.unroll,
    )
    whole = self.remat if self.remat == 'full' else 'none'
    stack = transformer.scan_stack(
      FlowBlock, self.blocks, self._unroll, whole, nn.broadcast, 'blocks'
    )
    self.stack = stack(**settings)
    self.one_block = FlowBlock(**settings, parent=None)
    if self.num_classes:
      self.class_embedding = transformer.class_embedding(self.num_classes, self.width, self.dtype)

  def __call__(self, x, labels):  # [B, N, d], int [B]
    """Maps data to latents; returns z [B, N, d] and log|det| of each block [T, B], nats."""
    z, log_dets = self.stack(x, self._condition(labels))
    return (z if self.final_permutation else z[:, ::-1]), log_dets

  def inverse(self, z, labels, chunks=None, tolerance=0.0):
    """Maps latents to data.

    Args:
      z: [B, N, d].
      labels: int [B].
      chunks: for each block the tokens found together, as `FlowBlock.inverse` explains; None takes
        them one by one everywhere, which is exact.
      tolerance: see there.

    Returns:
      [B, N, d] and the `Convergence` of each block, [T, B].
    """
    chunks = tuple(chunks or (1,) * self.blocks)
    condition = self._condition(labels)
    z = z if self.final_permutation else z[:, ::-1]
    params = self.stack.variables['params']
    reports: list[Convergence] = []
    # Neighbours of one kind share a loop: compile time follows the number of kinds, not of blocks.
    runs = [list(run) for _, run in itertools.groupby(range(self.blocks), chunks.__getitem__)]
    for run in reversed(runs):
      chunk = chunks[run[0]]

      def undo_block(z, params, chunk=chunk):
        return self._undo(params, z, condition, chunk, tolerance)

      part = jax.tree.map(lambda a, run=run: a[run[0] : run[-1] + 1], params)
      z, report = jax.lax.scan(undo_block, z, part, reverse=True)
      reports.insert(0, report)
    return z, jax.tree.map(lambda *parts: jnp.concatenate(parts), *reports)

  def inverse_block(self, z, labels, block, chunk=1, tolerance=0.0):
    """Undoes one block (counted from 0, may be traced), as part of `inverse`: [B, N, d] as the
    block gives it to what it makes of that, and the `Convergence` [B]."""
    params = jax.tree.map(lambda a: a[block], self.stack.variables['params'])
    return self._undo(params, z, self._condition(labels), chunk, tolerance)

  def log_scale_ranges(self, x, labels):  # [B, N, d], int [B]
    """The lowest and the highest log σ in each block, [T, 2]."""
    condition = self._condition(labels)

    def run_block(z, params):
      args = {'params': params}, z, condition
      return self.one_block.apply(*args, method='log_scale_range')

    return self._scan(run_block, x, self.stack.variables['params'])[1]

  def stages(self, x, labels):
    """z⁰ … z^T, [T + 1, B, N, d]: what each block takes, and at the end what the last one gives,
    tokens in the order in which they come there."""
    condition = self._condition(labels)

    def run_block(z, params):
      z, _ = self.one_block.apply({'params': params}, z, condition)
      return z, z

    _, stages = self._scan(run_block, x, self.stack.variables['params'])
    return jnp.concatenate([x[None], stages])

  def guess(self, z, labels):
    """Undoes all blocks approximately, one after the other, each in one pass: `FlowBlock.guess`.

    Args:
      z: [B, N, d], the last of the `stages`.
      labels: int [B].

    Returns:
      Guesses of the other stages [T, B, N, d], the first being the data; and the blocks' hidden
      states [T, B, N - 1, width].
    """
    condition = self._condition(labels)

    def undo_block(z, params):
      z, hidden = self._guess(params, z, condition)
      return z, (z, hidden)

    return self._scan(undo_block, z, self.stack.variables['params'], reverse=True)[1]

  def inverse_from_guesses(self, student, z, labels, tolerance, rounds):
    """Maps latents to data: at each block a student's guess, improved by `rounds` passes of
    fixed-point iteration.

    Args:
      student: a `Flow` with weights for `guess`.
      z: [B, N, d], the last of the `stages`.
      labels: int [B].
      tolerance: as `fixed_point.solve` takes it.
      rounds: see there.

    Returns:
      [B, N, d] and the `Convergence` of each block, [T, B]; without any rounds residuals are
      unknown, nan.
    """
    condition, student_condition = self._condition(labels), student._condition(labels)

    def undo_block(z, params):
      own, learned = params
      guess, _ = student._guess(learned, z, student_condition)
      if rounds:
        return self._undo(own, z, condition, self.tokens - 1, tolerance, guess, rounds)
      unknown = jnp.full(len(z), jnp.nan, guess.dtype)
      return guess, Convergence(unknown, jnp.ones_like(unknown))

    params = self.stack.variables['params'], student.stack.variables['params']
    return self._scan(undo_block, z, params, reverse=True)

  def _scan(self, step, carry, inputs, reverse=False):
    unroll = min(self._unroll, self.blocks)
    return jax.lax.scan(step, carry, inputs, reverse=reverse, unroll=unroll)

  @property
  def _unroll(self):
    """Blocks compiled in a row: more than one only where their layers are."""
    return max(1, self.unroll // self.layers)

  def _undo(self, params, *args):
    return self.one_block.apply({'params': params}, *args, method='inverse')

  def _guess(self, params, *args):
    return self.one_block.apply({'params': params}, *args, method='guess')

  def _condition(self, labels):
    return self.class_embedding(labels) if self.num_classes else None
