"""Checksums depend on every element and not on the sharding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax.checkpoints import checksums
from tests.support import processes


def checksum(array):
  return checksums.of_tree({'a': array})['a'][2]


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'float16', 'int32', 'uint32', 'bool', 'float64', 'int64']
)
def test_the_lowest_bit_of_each_element_counts(dtype):
  with jax.enable_x64(dtype.endswith('64')):
    values = np.asarray(jax.random.randint(jax.random.key(0), (5, 3, 2), 0, 2), dtype)
    found = {checksum(jnp.asarray(values))}
    for index in range(values.size):
      changed = values.copy()
      changed.reshape(-1)[index : index + 1].view(np.uint8)[0] ^= 1
      found.add(checksum(jnp.asarray(changed)))
  assert len(found) == 1 + values.size


def test_order_shape_and_signs_count():
  values = jnp.arange(12.0)
  # The checksum is a constant, because later versions must read checkpoints of this version.
  assert checksums.of_tree({'a': values})['a'] == [[12], 'float32', 'a4e4c5e20c30efab']
  assert checksums.of_tree({'a': jnp.float32(1)})['a'][0] == []
  assert checksum(values[::-1]) != checksum(values)
  assert checksums.of_tree({'a': values.reshape(3, 4)}) != checksums.of_tree({'a': values})
  # The changes of two signs do not cancel.
  pairs = [jnp.array((i, j)) for i in range(1, 12) for j in range(i)]
  assert len({checksum(values.at[pair].multiply(-1)) for pair in pairs}) == len(pairs)


def test_checksum_does_not_depend_on_the_sharding():
  found = json.loads(processes.run_program('sharded_checksums', devices=4))
  assert found == [checksum(jax.random.normal(jax.random.key(0), (8, 6, 4)))] * 4
