"""Prints the checksums of one array with each of four shardings, on four devices, as JSON."""

import json

import jax
from jax.sharding import NamedSharding, PartitionSpec

from farmer_jax.checkpoints import checksums

SPECS = [(), ('a',), (None, 'b', 'a'), (('a', 'b'),)]


if __name__ == '__main__':
  mesh = jax.make_mesh((2, 2), ('a', 'b'))
  array = jax.random.normal(jax.random.key(0), (8, 6, 4))
  shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in SPECS]
  sums = [checksums.of_tree([jax.device_put(array, s)])['0'][2] for s in shardings]
  print(json.dumps(sums))
