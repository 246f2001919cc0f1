"""Random images, for measuring speed and memory without a data set."""

import dataclasses

import numpy as np

from farmer_jax.data import base


@dataclasses.dataclass(frozen=True, eq=False)
class SyntheticSource(base.Source):
  """Images of uniformly random bytes; the one at an index is a function of its key alone."""

  keys: np.ndarray  # int64 [N], seeds of the images
  image_size: int
  channels: int
  num_classes: int
  class_names: tuple[str, ...] = ()

  def __len__(self):
    return len(self.keys)

  def __getitem__(self, index):
    key = int(self.keys[index])
    shape = (self.image_size, self.image_size, self.channels)
    image = np.random.default_rng(key).integers(0, 256, shape, np.uint8)
    return {'image': image, 'label': np.int32(key % self.num_classes if self.num_classes else 0)}


def load(data, split):
  """`data.synthetic_examples` images, of which `data.valid_fraction` is held out."""
  count = data.synthetic_examples
  labels = np.arange(count) % max(1, data.num_classes)
  keys = base.part([str(index) for index in range(count)], labels, data, split)
  source = SyntheticSource(keys, data.image_size, data.channels, data.num_classes)
  return base.in_memory(source, data, 'making images')
