"""Loads image sources by name. Contains the sources digits, fashion_mnist and synthetic.

Example:
  source = load(data, 'train')
  len(source), source.class_names
  source[0]              # {'image': uint8 [H, W, C], 'label': int32 []}
  source.gather([0, 7])  # {'image': uint8 [2, H, W, C], 'label': int32 [2]}
"""

import dataclasses
import gzip
import pathlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Int, Int64, UInt8

from farmer_jax import config
from farmer_jax.data import base, folder, images, tfds
from farmer_jax.errors import ConfigError, DataError

FASHION_MNIST_CLASSES = (
  *('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag'),
  'Ankle boot',
)


def load(data: config.Data, split: str, class_names: Sequence[str] = ()) -> base.Source:
  """Loads the split 'train' or 'valid' of the source `data.source`. The splits are disjoint.

  Images have the shape [image_size, image_size, channels]. Labels are in [0, num_classes), or all 0
  if num_classes is 0.

  `class_names` are the classes of a trained run, in the order of their labels. The label of an
  image is then the index of the name of its class, whatever the order of the classes in the data.
  Labels stay as they are if the names of the run or of the data are unknown.

  Raises:
    ConfigError: a setting does not match the data.
    DataError: the images, labels or files cannot be used, or a class is not in `class_names` and
      `data.unknown_classes` is 'stop'.
  """
  if split not in ('train', 'valid'):
    raise ValueError(f"split must be 'train' or 'valid', not {split!r}")
  if data.source == 'folder':
    source = folder.load(data, split, class_names)
  else:
    if data.path and data.source in ('digits', 'synthetic'):
      logging.warning(
        f'--config.data.path={data.path} has no effect with --config.data.source={data.source}. To'
        ' read image files, set --config.data.source=folder.'
      )
    source = _LOADERS.get(data.source, tfds.load)(data, split)
    source = base.with_classes(source, tuple(class_names), data)
  if not len(source):
    raise DataError(f'--config.data.source={data.source} has no images in its {split} split')
  logging.info(base.summary(source, split))
  return source


def _load_digits(data: config.Data, split: str) -> base.Source:
  """Loads the 1,797 handwritten 8×8 digits of scikit-learn. Scales their values 0–16 to 0–255."""
  import sklearn.datasets  # Imported here because it is slow and only this source needs it.

  digits = sklearn.datasets.load_digits()
  keys = [str(index) for index in range(len(digits.target))]
  chosen = base.split_indices(keys, digits.target, data, split)
  pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
  return _array_source(pixels, digits.target[chosen], tuple('0123456789'), data)


def _load_fashion_mnist(data: config.Data, split: str) -> base.Source:
  """Loads the images from the IDX files in `data.path`, or from TFDS if `data.path` is None."""
  if not data.path:
    return tfds.load(data, split)
  prefix = 'train' if split == 'train' else 't10k'
  folder_path = pathlib.Path(data.path).expanduser()
  image_file = folder_path / f'{prefix}-images-idx3-ubyte.gz'
  label_file = folder_path / f'{prefix}-labels-idx1-ubyte.gz'
  pixels, labels = _read_idx(image_file, 3), _read_idx(label_file, 1)
  if len(pixels) != len(labels):
    raise DataError(
      f'{image_file} has {len(pixels)} images but {label_file} has {len(labels)} labels; download'
      ' both files again'
    )
  if labels.max(initial=0) > 9:
    raise DataError(f'{label_file} has the label {labels.max()}, above 9; download it again')
  return _array_source(pixels, labels, FASHION_MNIST_CLASSES, data)


def _read_idx(path: pathlib.Path, dimensions: int) -> UInt8[np.ndarray, '...']:
  """Reads a gzipped IDX file: an array of bytes with `dimensions` dimensions."""
  header = 4 + 4 * dimensions
  try:
    content = gzip.decompress(path.read_bytes())
    if content[:4] != bytes((0, 0, 8, dimensions)):  # 8: unsigned bytes.
      raise ValueError(f'it is not an array of bytes with {dimensions} dimensions')
    shape = struct.unpack(f'>{dimensions}I', content[4:header])
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
  except (FileNotFoundError, NotADirectoryError) as error:
    raise ConfigError(
      f'there is no {path.name} in --config.data.path={path.parent}; set it to a folder with the'
      ' four IDX .gz files of Fashion-MNIST'
    ) from error
  except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
    raise DataError(f'{path} is not a valid IDX file ({error}); download it again') from error


def _array_source(
  pixels: UInt8[np.ndarray, 'L H W'],
  labels: Int[np.ndarray, 'L'],
  class_names: tuple[str, ...],
  data: config.Data,
) -> base.ArraySource:
  """Returns a source of gray images, with the image size, channels and classes of `data`."""
  base.check_num_classes(data, len(class_names), f'--config.data.source={data.source}')
  fitted = images.from_arrays(pixels, data.image_size, data.channels)
  if not data.num_classes:
    return base.ArraySource(fitted, np.zeros(len(labels), np.int32))
  return base.ArraySource(fitted, labels.astype(np.int32), class_names)


@dataclasses.dataclass(frozen=True, eq=False)
class _RandomSource(base.Source):
  """Images of uniformly distributed random bytes. The key of an image is its seed."""

  keys: Int64[np.ndarray, 'L']
  data: config.Data
  class_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.keys)

  def __getitem__(self, index: int) -> base.Example:
    key, data = int(self.keys[index]), self.data
    shape = (data.image_size, data.image_size, data.channels)
    image = np.random.default_rng(key).integers(0, 256, shape, np.uint8)
    return {'image': image, 'label': np.int32(key % max(1, data.num_classes))}


def _load_synthetic(data: config.Data, split: str) -> base.Source:
  """Makes `data.synthetic_examples` random images, to measure speed and memory."""
  keys = np.arange(data.synthetic_examples)
  chosen = base.split_indices(list(map(str, keys)), keys % max(1, data.num_classes), data, split)
  return base.cache_in_memory(_RandomSource(chosen, data), data, 'making images')


_LOADERS = {
  'digits': _load_digits,
  'fashion_mnist': _load_fashion_mnist,
  'synthetic': _load_synthetic,
}
