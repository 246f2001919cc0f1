"""Checksums of sharded arrays, which detect a change of any single 32-bit word."""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped, UInt32


def of_tree(tree: PyTree) -> dict[str, list]:
  """Returns {path: [shape, dtype, checksum]} of all arrays. A checksum has 16 hexadecimal digits.

  The devices that hold an array compute its checksum, which does not depend on the mesh or on the
  number of processes. All processes that share the arrays must call this function.
  """
  leaves = leaves_by_path(tree)
  # Each array has its own program: on CPUs, one program for all arrays would hold the bits of all
  # arrays in memory at once. The programs run one at a time: devices of several processes may start
  # programs in different orders and would wait for each other forever.
  sums = [jax.device_get(_jitted_sums(leaf.sharding)(leaf)) for leaf in leaves.values()]
  return {
    path: [*shape_and_dtype(leaf), f'{first:08x}{second:08x}']
    for (path, leaf), (first, second) in zip(leaves.items(), sums, strict=True)
  }


def of_json(value: Any) -> str:
  """Returns the SHA-256 of a value that JSON can represent, as hexadecimal digits."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves of a tree by path, for example 'params/flow/kernel'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def shape_and_dtype(leaf: Any) -> list:
  """Returns [shape, dtype] as JSON represents them: a list of ints and a string."""
  return [list(leaf.shape), str(leaf.dtype)]


@functools.cache
def _jitted_sums(sharding: jax.sharding.Sharding) -> Callable[[Array], UInt32[Array, '2']]:
  if isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.jit(_sums, out_shardings=sharding)


def _sums(array: Shaped[Array, '...']) -> UInt32[Array, '2']:
  """Returns two sums of the bits of an array.

  Before the sum, a bijection mixes each 32-bit word with its position. Therefore a change of a
  single word always changes the sums. Integer sums wrap and do not depend on the order.
  """
  bits = _bits(array)
  position = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    position = position * jnp.uint32(bits.shape[axis] % 2**32) + index
  position = _mix(position + jnp.uint32(0x9E3779B9))
  first = jnp.sum(_mix(bits ^ position), dtype=jnp.uint32)
  second = jnp.sum(_mix(bits + position * jnp.uint32(0x2545F491)), dtype=jnp.uint32)
  return jnp.stack([first, second])


def _bits(array: Shaped[Array, '...']) -> UInt32[Array, '...']:
  """Returns the bits of an array as 32-bit words. 64-bit elements get a last axis of size 2."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  width = min(array.dtype.itemsize, 4)
  return jax.lax.bitcast_convert_type(array, f'uint{8 * width}').astype(jnp.uint32)


def _mix(bits: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """Applies the finalizer of MurmurHash3, a bijection whose outputs look random."""
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
  return bits ^ (bits >> 16)
