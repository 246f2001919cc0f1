"""Fashion-MNIST from its four original IDX files, or through TFDS."""

import gzip
import pathlib
import struct
import zlib

import numpy as np

from farmer_jax.data import base, images, tfds
from farmer_jax.errors import ConfigError

CLASS_NAMES = (
  'T-shirt/top',
  'Trouser',
  'Pullover',
  'Dress',
  'Coat',
  'Sandal',
  'Shirt',
  'Sneaker',
  'Bag',
  'Ankle boot',
)

_PREFIXES = {'train': 'train', 'valid': 't10k'}


def load(data, split):
  """The 60,000 training images, or for 'valid' the 10,000 test images.

  Without `data.path`, they come from TFDS's default folder.
  """
  base.check_classes(data, len(CLASS_NAMES), '--config.data.source=fashion_mnist')
  if not data.path:
    return tfds.load(data, split)
  prefix = pathlib.Path(data.path) / _PREFIXES[split]
  image_file = prefix.with_name(f'{prefix.name}-images-idx3-ubyte.gz')
  label_file = prefix.with_name(f'{prefix.name}-labels-idx1-ubyte.gz')
  pixels, labels = read_idx(image_file, 3), read_idx(label_file, 1)
  if len(pixels) != len(labels):
    raise ConfigError(
      f'{image_file} has {len(pixels)} images but {label_file} has {len(labels)} labels; get both'
      ' files again'
    )
  if len(labels) and labels.max() >= len(CLASS_NAMES):
    raise ConfigError(f'{label_file} has the label {labels.max()}, above 9; get the file again')
  return base.ArraySource(
    images.from_arrays(pixels, data.image_size, data.channels),
    base.label_array(labels, data),
    CLASS_NAMES if data.num_classes else (),
  )


def read_idx(path, dimensions):
  """Reads a gzipped IDX file of bytes.

  Args:
    path: pathlib.Path of the .gz file.
    dimensions: number of dimensions that it must have.

  Returns:
    uint8 array of that many dimensions.

  Raises:
    ConfigError: the file is missing, damaged, truncated, or something else.
  """
  try:
    content = gzip.decompress(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError) as error:
    raise ConfigError(
      f'there is no {path.name} in --config.data.path={path.parent}; set it to a folder with the'
      ' four IDX .gz files of Fashion-MNIST'
    ) from error
  except (OSError, EOFError, zlib.error) as error:
    raise ConfigError(f'{path} cannot be read ({error}); get the file again') from error
  header = 4 + 4 * dimensions
  magic = bytes((0, 0, 8, dimensions))  # 8: unsigned bytes.
  if len(content) < header or content[:4] != magic:
    raise ConfigError(f'{path} is not an IDX file of bytes in {dimensions} dimensions')
  shape = struct.unpack(f'>{dimensions}I', content[4:header])
  expected = int(np.prod(shape, dtype=object))
  if len(content) - header != expected:
    raise ConfigError(
      f'{path} is damaged: its header promises {expected} bytes, and {len(content) - header} follow'
    )
  return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
