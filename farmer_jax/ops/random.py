"""Random keys by name, and categorical draws.

A key depends only on a seed, a name and indices. A new name therefore does not change the draws of
other names, and a resumed run makes the same draws as an uninterrupted run.
"""

import math
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from farmer_jax.ops.arrays import Index


def named_key(seed: int, name: str, *indices: Index) -> PRNGKeyArray:
  """Returns the key of `name` at `indices`, such as a step or an image index."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  for index in indices:
    key = jax.random.fold_in(key, index)
  return key


def categorical(
  key: PRNGKeyArray, logits: Float[Array, '*lead K'], shape: tuple[int, ...] = ()
) -> Int[Array, '...']:
  """Draws indices [*lead, *shape] from unnormalized log-weights.

  Uses one uniform number per draw. `jax.random.categorical` uses K.
  """
  cumulative = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
  lead, draws = logits.shape[:-1], math.prod(shape)
  u = jax.random.uniform(key, (*lead, draws), cumulative.dtype) * cumulative[..., -1:]
  below = (cumulative[..., None, :] <= u[..., None]).sum(-1)
  # Rounding can make u equal to the upper end.
  return jnp.minimum(below, logits.shape[-1] - 1).reshape(*lead, *shape)
