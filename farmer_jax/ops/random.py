"""Random keys by name.

A key is a pure function of (seed, name, index): a new consumer of randomness never changes what the
others draw, and a resumed run draws what the uninterrupted one would have drawn.
"""

import zlib

import jax


def named_key(seed, name, *indices):
  """The key of stream `name` at `indices` (a step, a sample number; each an int or a traced
  scalar)."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  for index in indices:
    key = jax.random.fold_in(key, index)
  return key
