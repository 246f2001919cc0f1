"""Where arrays live."""

import jax
from jax.sharding import NamedSharding, PartitionSpec


class LocalDevices:
  """This process's devices, which share batches between them and hold everything else each."""

  def __init__(self):
    devices = jax.local_devices()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ('data',), devices=devices, axis_types=auto)
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
