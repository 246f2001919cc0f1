"""The device mesh, and how parameters and batches are sharded over it."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from farmer_jax import config as config_lib
from farmer_jax.errors import ConfigError

AXES = ('data', 'fsdp', 'tensor')


class Mesh:
  """The devices of all processes as a mesh with the axes `data`, `fsdp` and `tensor`.

  Batches are sharded over `data` and `fsdp`. Parameters and the optimizer state are sharded by the
  rules of `config.Mesh`, by default over `fsdp` and `tensor`.

  Attributes:
    mesh: the `jax.sharding.Mesh`.
    batch_shards: the number of shards of a batch.
    replicated: the sharding of arrays that every device holds completely.
    sharded: the sharding of batches, along their first axis.

  Raises:
    ConfigError: the axis sizes do not fit the number of devices, or a rule names an unknown axis.
  """

  def __init__(self, mesh: config_lib.Mesh, devices: Sequence[jax.Device] | None = None):
    devices = jax.devices() if devices is None else devices  # of all processes
    sizes = _axis_sizes(mesh, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    self.mesh = jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    self.batch_shards = sizes[0] * sizes[1]
    # The devices that share one copy of the parameters are the members of a group.
    self._rules: list[tuple[str, Any]] = [
      *(('batch', ('data', 'fsdp')), ('group', ('data',)), ('members', ('tensor', 'fsdp'))),
      *((name, _parse_rule(name, getattr(mesh, name))) for name in ('embed', 'hidden', 'outputs')),
    ]
    self.replicated = NamedSharding(self.mesh, PartitionSpec())
    self.sharded = NamedSharding(self.mesh, PartitionSpec(('data', 'fsdp')))

  @contextlib.contextmanager
  def activate(self) -> Iterator[None]:
    """Context in which traced functions resolve sharding constraints on this mesh."""
    with jax.set_mesh(self.mesh), nn.logical_axis_rules(self._rules):
      yield

  def shardings(self, tree: PyTree) -> PyTree:
    """Returns the sharding of each array of a tree, by the logical axis names in its box.

    Arrays without an `nn.Partitioned` box and axes that cannot be divided evenly are replicated.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(tree), self._rules)
    uneven, total = 0, 0

    def sharding(spec: PartitionSpec, leaf: Any) -> NamedSharding:
      nonlocal uneven, total
      axes = zip(spec, leaf.shape[: len(spec)], strict=True)
      even = [axis if size % self._num_shards(axis) == 0 else None for axis, size in axes]
      total += leaf.size
      uneven += leaf.size * (even != list(spec))
      return NamedSharding(self.mesh, PartitionSpec(*even))

    shardings = jax.tree.map(
      sharding, specs, unboxed(tree), is_leaf=lambda node: isinstance(node, PartitionSpec)
    )
    if uneven > total / 20:
      logging.info(
        f'{uneven / total:.0%} of the training state is not sharded over all axes of the mesh'
        f' {dict(self.mesh.shape)}, because array sizes are not multiples of the axis sizes.'
      )
    return shardings

  def abstract(self, tree: PyTree) -> PyTree:
    """Returns a `jax.ShapeDtypeStruct` with a sharding for each array of a tree of shapes."""
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      unboxed(tree),
      self.shardings(tree),
    )

  def process_shard(self) -> tuple[int, int]:
    """Returns the shard of each batch that this process reads: (index, number of shards).

    Processes that differ only along the axis `tensor` read the same shard.
    """
    count = self.batch_shards
    slices = self.sharded.addressable_devices_indices_map((count,)).values()
    rows = sorted({row for part in slices if part for row in range(*part[0].indices(count))})
    size = len(rows)
    if rows[-1] - rows[0] >= size or rows[0] % size:  # not adjacent, or not one of equal shards
      raise ConfigError(
        f'--config.mesh.tensor={self.mesh.shape["tensor"]} must be a divisor or a multiple of the'
        f' number of devices of a process, {jax.local_device_count()}'
      )
    return rows[0] // size, count // size

  def global_batch(self, arrays: PyTree) -> PyTree:
    """Assembles global arrays, sharded along their first axis, from each process's NumPy shard."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(self.sharded, a), arrays)

  def round_up(self, batch_size: int) -> int:
    """Rounds a batch size up to a multiple of the number of shards."""
    return -(-batch_size // self.batch_shards) * self.batch_shards

  def _num_shards(self, axis: None | str | tuple[str, ...]) -> int:
    return math.prod(self.mesh.shape[name] for name in jax.tree.leaves(axis))


def _axis_sizes(mesh: config_lib.Mesh, num_devices: int) -> tuple[int, ...]:
  """Returns the axis sizes. A configured size of 0 takes the remaining devices."""
  given = [mesh.data, mesh.fsdp, mesh.tensor]
  # The default data=0 means 1 if another axis takes the remaining devices.
  sizes = [1 if not given[0] and 0 in given[1:] else given[0], *given[1:]]
  known = math.prod(size for size in sizes if size)
  sizes = [size or max(1, num_devices // known) for size in sizes]
  if math.prod(sizes) != num_devices:
    keys = ', '.join(f'--config.mesh.{a}={n}' for a, n in zip(AXES, given, strict=True))
    raise ConfigError(
      f'the product of {keys} must be the number of devices, {num_devices}; a size of 0 takes the'
      ' remaining devices'
    )
  return tuple(sizes)


def _parse_rule(name: str, rule: str) -> tuple[str, ...] | None:
  """Returns the mesh axes in config.mesh.<name>, such as 'fsdp,tensor', or None if it is empty."""
  axes = tuple(filter(None, rule.split(',')))
  if set(axes) - set(AXES) or len(set(axes)) < len(axes):
    raise ConfigError(
      f'--config.mesh.{name}={rule!r} must list some of {", ".join(AXES)}, each at most once'
    )
  return axes or None


def unboxed(tree: PyTree) -> PyTree:
  """Removes boxes. Unlike `nn.unbox`, this function adds no sharding constraints."""
  return jax.tree.map(
    lambda node: getattr(node, 'value', node) if isinstance(node, nn.meta.AxisMetadata) else node,
    tree,
    is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata),
  )


class LocalDevices(Mesh):
  """The devices of this process, for sampling and evaluation.

  `fsdp` x `tensor` devices share one copy of the parameters, as in training. The remaining devices
  have further copies, whatever `config.mesh.data` is.

  No program of these jobs spans processes. Each process works on its own images, so processes need
  not wait for each other at each program, and each writes its own results. The devices of one
  process therefore hold all parameters together.
  """

  def __init__(self, mesh: config_lib.Mesh | None = None, adapt: bool = False) -> None:
    """Makes the mesh. With `adapt`, the sizes are reduced to divisors of the number of devices.

    Raises:
      ConfigError: the sizes do not divide the number of devices, and `adapt` is False.
    """
    devices, mesh = jax.local_devices(), mesh or config_lib.Mesh()
    given = {'tensor': mesh.tensor, 'fsdp': mesh.fsdp}
    sizes, remaining = {}, len(devices)
    for axis in sorted(given, key=lambda axis: not given[axis]):  # A size of 0 takes the remainder.
      sizes[axis] = math.gcd(given[axis], remaining)
      remaining //= sizes[axis]
    if any(size not in (0, sizes[axis]) for axis, size in given.items()):
      asked = f'--config.mesh.fsdp={mesh.fsdp} times --config.mesh.tensor={mesh.tensor}'
      if not adapt:
        raise ConfigError(
          f'{asked} must divide the number of devices of a process, {len(devices)}, because one'
          ' process holds all parameters; use smaller sizes, or one process for all devices of a'
          ' machine'
        )
      logging.warning(
        f'{asked} of the training run does not divide the number of devices of this process,'
        f' {len(devices)}. The parameters are sharded over fsdp={sizes["fsdp"]},'
        f' tensor={sizes["tensor"]}.'
      )
    fsdp, tensor = sizes['fsdp'], sizes['tensor']
    super().__init__(dataclasses.replace(mesh, data=0, fsdp=fsdp, tensor=tensor), devices)

  def shard(self, tree: PyTree) -> PyTree:
    """Shards arrays along their first axis."""
    return jax.device_put(tree, self.sharded)
