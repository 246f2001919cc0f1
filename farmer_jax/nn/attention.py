"""Attention: softmax attention, the key/value cache, and scans over tokens with a cache.

Axis letters: B batch, h heads, n queries, m keys, D width of a head.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PyTree

from farmer_jax.nn import attention_kernels, layers
from farmer_jax.ops.arrays import Index

Queries = Float[Array, 'B h n D']
Keys = Float[Array, 'B h m D']  # or values
LayerCache = tuple[Keys, Keys]  # keys, values
# One entry per layer. XLA would copy slices of one array for all layers at each decoding step.
Cache = tuple[LayerCache, ...]

# Queries per chunk of causal attention over a full sequence.
_QUERY_CHUNK = 256

# `scan_with_cache` runs at most 4 segments, each of at least 64 tokens except the last segment.
_MAX_SEGMENTS, _MIN_SEGMENT_TOKENS = 4, 64


def attend(
  q: Queries,
  k: Keys,
  v: Keys,
  causal: bool,
  position: Index = 0,
  setting: attention_kernels.Setting = 'xla',
) -> Float[Array, 'B n h*D']:
  """Softmax attention with `q` scaled by 1/sqrt(D). Returns merged heads in the dtype of `q`.

  With `causal`, query i sees only the keys 0 … position + i. Attention over a full sequence uses
  the kernel that `setting` (`config.model.attention`) selects. Without a kernel, causal attention
  runs in chunks of queries that fit into fast memory, each with only the keys that it can see.
  """
  q = q / math.sqrt(q.shape[-1])
  n = q.shape[2]
  is_full_pass = isinstance(position, int) and position == 0 and q.shape == k.shape
  if is_full_pass and (kernel := attention_kernels.choose(setting, q)) != 'xla':
    heads = checkpoint_name(attention_kernels.attend(kernel, q, k, v, causal), 'attention')
    return heads.transpose(0, 2, 1, 3).reshape(len(q), n, -1)
  if not causal or n != k.shape[2] or n < 2 * _QUERY_CHUNK:
    return _attend_chunk(q, k, v, causal, position)
  chunks = []
  for start in range(0, n, _QUERY_CHUNK):
    end = start + _QUERY_CHUNK
    visible = k[:, :, :end], v[:, :, :end]
    chunks.append(_attend_chunk(q[:, :, start:end], *visible, causal, position + start))
  return jnp.concatenate(chunks, axis=1)


def _attend_chunk(
  q: Queries, k: Keys, v: Keys, causal: bool, position: Index
) -> Float[Array, 'B n h*D']:
  """Attention with queries that are already scaled.

  The division by the total weight follows the product with the values, and the mask is added to the
  scores. The backward pass then needs only one array of n x m numbers, the exponentials.
  """
  scores = layers.product('bhnd,bhmd->bhnm', q, k)
  if causal:
    visible = jnp.arange(k.shape[2]) <= position + jnp.arange(q.shape[2])[:, None]
    scores += jnp.where(visible, 0.0, -jnp.inf)
  largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - checkpoint_name(largest, 'attention')).astype(q.dtype)
  sums = _weighted_sums(weights, v)
  total = checkpoint_name(sums[..., -1].transpose(0, 2, 1), 'attention')
  merged = sums[..., :-1].transpose(0, 2, 1, 3).reshape(*total.shape[:2], -1).astype(q.dtype)
  heads = checkpoint_name(merged, 'attention').reshape(*total.shape, -1)
  # One reciprocal replaces D divisions. On TPUs a division takes several instructions.
  return (heads * (1 / total)[..., None]).astype(q.dtype).reshape(merged.shape)


@jax.custom_jvp
def _weighted_sums(weights: Float[Array, 'B h n m'], v: Keys) -> Float[Array, 'B h n D+1']:
  """Returns the weighted sums of the values and, in the last column, the sum of the weights."""
  return layers.product('bhnm,bhmd->bhnd', weights, _append_column(v, 1))


@_weighted_sums.defjvp
def _weighted_sums_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
  """Derivative that treats the column of ones as a constant.

  JAX's default rule slices this column off in the backward pass, which on TPUs is slow.
  """
  (weights, v), (weights_dot, v_dot) = primals, tangents
  from_values = layers.product('bhnm,bhmd->bhnd', weights, v_dot)
  from_weights = layers.product('bhnm,bhmd->bhnd', weights_dot, _append_column(v, 1))
  return _weighted_sums(weights, v), from_weights + _append_column(from_values, 0)


def _append_column(a: Array, value: int) -> Array:  # [B, h, n, D] -> [B, h, n, D + 1]
  return jnp.pad(a, ((0, 0),) * 3 + ((0, 1),), constant_values=value)


def split_heads(x: Float[Array, 'B n width'], head_dim: int) -> Queries:
  """Splits the last axis into heads, and moves them before the tokens for contiguous matrices."""
  return x.reshape(*x.shape[:2], -1, head_dim).transpose(0, 2, 1, 3)


def update_cache(cache: LayerCache, k: Queries, v: Queries, position: Index) -> LayerCache:
  """Writes the keys and values of n tokens into a cache, starting at `position`."""
  start = tuple(jnp.asarray(index, jnp.int32) for index in (0, 0, position, 0))
  cached_k, cached_v = (
    jax.lax.dynamic_update_slice(old, new, start) for old, new in zip(cache, (k, v), strict=True)
  )
  return cached_k, cached_v


def scan_with_cache(
  step: Callable[[Any, Any], tuple[Any, Any]],
  carry: Any,
  cache: PyTree,
  inputs: PyTree,
  tokens_per_step: int = 1,
) -> tuple[Any, PyTree]:
  """Scans step((carry, cache), inputs) -> ((carry, cache), outputs) with a cache that grows.

  Attention reads the full cache, so a cache of the final length would waste time at the first
  tokens. The scan runs in at most 4 segments, and the cache grows before each segment. `cache` is a
  `Cache` without unused positions, or None. Each step writes `tokens_per_step` tokens into it.

  Returns the last carry and the stacked outputs.
  """
  steps = len(jax.tree.leaves(inputs)[0])
  segment_steps = max(-(-steps // _MAX_SEGMENTS), -(-_MIN_SEGMENT_TOKENS // tokens_per_step))
  outputs = []
  for first in range(0, steps, segment_steps):
    segment = jax.tree.map(lambda a, i=first: a[i : i + segment_steps], inputs)
    room = min(segment_steps, steps - first) * tokens_per_step
    cache = jax.tree.map(lambda a, n=room: jnp.pad(a, ((0, 0), (0, 0), (0, n), (0, 0))), cache)
    (carry, cache), segment_outputs = jax.lax.scan(step, (carry, cache), segment)
    outputs.append(segment_outputs)
  return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
