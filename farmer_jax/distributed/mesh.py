"""Where arrays live: the mesh of devices, and how parameters and batches are split over it."""

import contextlib
import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from farmer_jax import terminal
from farmer_jax.errors import ConfigError

AXES = ('data', 'fsdp', 'tensor')


class Mesh:
  """The devices of all processes, as the axes `data`, `fsdp` and `tensor`.

  Batches are split over `data` and `fsdp`. Parameters, and what the optimizer keeps of them, are
  split as `config.Mesh` says, over `fsdp` and `tensor` by default.

  Args:
    settings: `config.Mesh`.
    devices: all by default.

  Raises:
    ConfigError: the axes do not fit the devices.
  """

  def __init__(self, settings, devices=None):
    devices = jax.devices() if devices is None else devices
    given = [settings.data, settings.fsdp, settings.tensor]
    # Where another axis takes what is left, nothing is left for data.
    sizes = [1 if not given[0] and 0 in given[1:] else given[0], *given[1:]]
    known = math.prod(size for size in sizes if size)
    sizes = [size or max(1, len(devices) // known) for size in sizes]
    if math.prod(sizes) != len(devices):
      named = zip(AXES, given, strict=True)
      raise ConfigError(
        f'{", ".join(f"config.mesh.{axis}={size}" for axis, size in named)} do not multiply to the'
        f' {len(devices)} devices; 0 takes the rest'
      )
    types = (AxisType.Auto,) * len(AXES)
    self.mesh = jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    self.batch_parts = sizes[0] * sizes[1]
    # A group is the devices that share parameters between them, and the images that these have.
    self._rules: list[tuple[str, Any]] = [
      ('batch', ('data', 'fsdp')),
      ('group', ('data',)),
      ('members', ('tensor', 'fsdp')),
    ]
    split_by = {'embed': settings.embed, 'hidden': settings.hidden, 'outputs': settings.outputs}
    for name, rule in split_by.items():
      names = tuple(filter(None, rule.split(',')))
      self._check_rule(name, names)
      self._rules.append((name, names or None))
    self.whole = NamedSharding(self.mesh, PartitionSpec())
    self.split = NamedSharding(self.mesh, PartitionSpec(('data', 'fsdp')))

  @contextlib.contextmanager
  def __call__(self):
    """Context in which functions are traced: their constraints hold on this mesh."""
    with jax.set_mesh(self.mesh), nn.logical_axis_rules(self._rules):
      yield

  def shardings(self, tree):
    """How the arrays of a tree are split, by the logical names in their boxes; without a box, or
    where an axis cannot be divided evenly, they are not.

    Args:
      tree: of shapes and dtypes, some in boxes.

    Returns:
      The same tree without boxes, of shardings.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(tree), self._rules)
    whole, total = 0, 0

    def sharding(spec, leaf):
      nonlocal whole, total
      named = zip(spec, leaf.shape[: len(spec)], strict=True)
      even = [axis if size % self._parts(axis) == 0 else None for axis, size in named]
      total += leaf.size
      whole += leaf.size * (even != list(spec))
      return NamedSharding(self.mesh, PartitionSpec(*even))

    def is_spec(node):
      return isinstance(node, PartitionSpec)

    found = jax.tree.map(sharding, specs, unboxed(tree), is_leaf=is_spec)
    if whole > total / 20:
      terminal.say(
        f'{whole / total:.0%} of the state cannot be split over all axes of the mesh'
        f' {dict(self.mesh.shape)}: its sizes are not multiples of theirs.'
      )
    return found

  def abstract(self, tree):
    """Describes the arrays of a tree of shapes, some in boxes, where `shardings` puts them."""

    def describe(leaf, sharding):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, unboxed(tree), self.shardings(tree))

  def place(self, tree):
    """Arrays that every process has whole, put where `shardings` says; the boxes are left out."""
    return jax.device_put(unboxed(tree), self.shardings(tree))

  def share(self):
    """Which of how many consecutive parts of each batch this process reads: (index, count).

    Processes between which only parameters are split read the same part.

    Raises:
      ConfigError: this process's devices want a part that is not in one piece.
    """
    count = self.batch_parts
    slices = self.split.addressable_devices_indices_map((count,)).values()
    rows = sorted({row for part in slices if part for row in range(*part[0].indices(count))})
    size = len(rows)
    if rows != list(range(rows[0], rows[0] + size)) or rows[0] % size:
      raise ConfigError(
        'on this mesh the devices of a process want parts of a batch that do not lie together; make'
        " config.mesh.tensor divide a process's devices, or be a multiple of them"
      )
    return rows[0] // size, count // size

  def batch(self, arrays):
    """Global arrays of which this process has a part, NumPy, split along their leading axis."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(self.split, a), arrays)

  def batch_size(self, wanted):
    """The smallest batch of at least `wanted` that can be split."""
    return -(-wanted // self.batch_parts) * self.batch_parts

  def _parts(self, axis):
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(self.mesh.shape[name] for name in names)

  def _check_rule(self, name, axes):
    unknown = set(axes) - set(AXES)
    if unknown or len(set(axes)) < len(axes):
      raise ConfigError(
        f'config.mesh.{name}={",".join(axes)!r} must be of {", ".join(AXES)}, each at most once'
      )


def unboxed(tree):
  """The tree without boxes. Flax's own function would also put constraints on what was in them."""

  def is_box(node):
    return isinstance(node, nn.meta.AxisMetadata)

  return jax.tree.map(lambda node: node.value if is_box(node) else node, tree, is_leaf=is_box)


class LocalDevices:
  """This process's devices, which share batches between them and hold everything else each."""

  def __init__(self):
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ('data',), devices=devices, axis_types=(AxisType.Auto,))
    self._whole = NamedSharding(mesh, PartitionSpec())
    self._split = NamedSharding(mesh, PartitionSpec('data'))
    self.count = len(devices)

  def batch_size(self, wanted):
    """The smallest batch of at least `wanted` that the devices can share."""
    return -(-wanted // self.count) * self.count

  def replicate(self, tree):
    """Copies arrays to each device."""
    return jax.device_put(tree, self._whole)

  def split(self, tree):
    """Spreads arrays over the devices along their leading axis."""
    return jax.device_put(tree, self._split)
