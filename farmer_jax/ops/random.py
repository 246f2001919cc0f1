"""Random keys by name, and draws.

A key is a pure function of (seed, name, index): a new consumer of randomness never changes what the
others draw, and a resumed run draws what the uninterrupted one would have drawn.
"""

import math
import zlib

import jax
import jax.numpy as jnp


def named_key(seed, name, *indices):
  """The key of stream `name` at `indices` (a step, a sample number; each an int or a traced
  scalar)."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  for index in indices:
    key = jax.random.fold_in(key, index)
  return key


def categorical(key, logits, shape=()):  # [..., K]
  """Draws indices from unnormalised log-weights; int32 [..., *shape].

  By inverting the cumulative distribution: one uniform number a draw, where
  `jax.random.categorical` takes K.
  """
  cumulative = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
  lead, draws = logits.shape[:-1], math.prod(shape)
  u = jax.random.uniform(key, (*lead, draws), cumulative.dtype) * cumulative[..., -1:]
  below = (cumulative[..., None, :] <= u[..., None]).sum(-1)
  # Rounding can put u on the upper end.
  return jnp.minimum(below, logits.shape[-1] - 1).reshape(*lead, *shape)
