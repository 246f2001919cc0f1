"""Checksums that notice a change of any single element of an array, wherever the array lies."""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp


def of_tree(tree):
  """Describes every leaf: its shape, its dtype and a checksum of its bits.

  The checksums are computed where the arrays are, one after the other, and are the same on any mesh
  and any number of processes; all processes that share the arrays must call.

  Returns:
    {path: [shape, dtype, checksum]}: a list of ints, a string, a string of 16 hexadecimal digits.
  """
  named = names(tree)
  # Not in one program: on CPUs the bits of all of them would be in memory at once. And not several
  # at a time: devices of several processes, free to begin with different ones, would wait for each
  # other for ever.
  sums = [jax.device_get(_compute(_everywhere(leaf.sharding))(leaf)) for leaf in named.values()]
  return {
    name: [*described(leaf), f'{first:08x}{second:08x}']
    for (name, leaf), (first, second) in zip(named.items(), sums, strict=True)
  }


def names(tree):
  """The leaves of a tree by their paths, as in params/flow/kernel."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def described(leaf):
  """Shape and dtype, as JSON knows them."""
  return [list(leaf.shape), str(leaf.dtype)]


def of_json(value):
  """The SHA-256 of what can be written as JSON, in hexadecimal digits."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _everywhere(sharding):
  """Where the sums of arrays of this sharding go: to every process that has a part of them."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return sharding


@functools.cache
def _compute(sharding):
  """`_sums`, compiled, with results at `sharding`."""
  return jax.jit(_sums, out_shardings=sharding)


def _sums(array):
  """Two sums of the bits of an array, uint32 [2].

  Every 32 bits are mixed with their position, one to one, before they are added: no change of one
  of them leaves a sum as it was. Integers wrap, and the order of adding them does not matter.
  """
  bits = _bits(array)
  position = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    position = position * jnp.uint32(bits.shape[axis] % 2**32) + along
  position = _mixed(position + jnp.uint32(0x9E3779B9))
  first = jnp.sum(_mixed(bits ^ position), dtype=jnp.uint32)
  second = jnp.sum(_mixed(bits + position * jnp.uint32(0x2545F491)), dtype=jnp.uint32)
  return jnp.stack([first, second])


def _bits(array):
  """The bits of an array, uint32 [...]; what has 64 bits gets a last axis of two."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  size = array.dtype.itemsize
  if size > 8 or not (jnp.issubdtype(array.dtype, jnp.number)):
    raise TypeError(f'no checksum is defined for {array.dtype}')
  width = min(size, 4)
  return jax.lax.bitcast_convert_type(array, f'uint{8 * width}').astype(jnp.uint32)


def _mixed(bits):
  """Each of uint32 [...] turned into another that looks random, one to one (MurmurHash3)."""
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
  return bits ^ (bits >> 16)
