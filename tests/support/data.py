"""Sources, image files and damaged files for the data tests."""

import copy
import dataclasses
import io
import os
import struct
import sys
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image
from absl import flags

from farmer_jax import config
from farmer_jax.data import base, pipeline, sources


@dataclasses.dataclass
class IndexSource(base.Source):
  """A source in which all pixels and the label of an example equal its index.

  `on_read(index)` can raise an exception or hang.
  """

  count: int
  on_read: Callable[[int], object] = lambda index: None
  class_names: tuple[str, ...] = ()

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    self.on_read(index)
    return {'image': np.full((2, 2, 1), index, np.uint8), 'label': np.int32(index)}


def train_iterator(source, batch_size=4, seed=3, share=(0, 1), **settings):
  data = config.Data(**{'threads': 2, 'prefetch': 2, **settings})
  return pipeline.TrainIterator(source, data, batch_size, seed, *share)


def values(iterator, batches=12):
  """Returns the first pixel of each image of the next batches, [batches * B]."""
  return np.concatenate([next(iterator)['image'][:, 0, 0, 0] for _ in range(batches)])


def parse_flags():
  """Parses absl flags like `absl.app.run`. Grain passes their values to its workers."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])


def encode(image, kind, **options):
  """Returns the bytes of an image file. `image` is a PIL image or uint8 array."""
  image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def write_image(path, value):
  """Writes an image of the gray level `value`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.new('RGB', (9, 7), (value, value, value)).save(path)


def write_classes(root, classes, count=10):
  """Writes `count` images per class. Each image has a different gray level."""
  for number, name in enumerate(classes):
    for index in range(count):
      write_image(root / name / f'{index}.png', number * count + index)


def folder_source(root, monkeypatch):
  """Returns a source of 24 image files, decoded on each access. Image i has gray level 10 * i."""
  monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  for index in range(24):
    write_image(root / f'{index:02}.png', 10 * index)
  data = config.Data('folder', str(root), image_size=4, num_classes=0, valid_fraction=0.05)
  return sources.load(data, 'train')


def remove(source, *indices):
  """Deletes files of a `folder_source`."""
  for index in indices:
    source.paths[index].unlink()


def path_of(source, level):
  """Returns the file of the image with gray level `level`."""
  return next(path for path in source.paths if 10 * int(path.stem) == level)


def png_chunk(name, content):
  checksum = struct.pack('>I', zlib.crc32(name + content))
  return struct.pack('>I', len(content)) + name + content + checksum


def png_of_pixel_data(width, height, depth, color, compressed):
  """Returns a PNG file with the given compressed pixel data, which may not match the header."""
  header = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)
  palette = [(b'PLTE', bytes(3 * 256)), (b'tRNS', bytes(256))] if color == 3 else []
  chunks = [(b'IHDR', header), *palette, (b'IDAT', compressed), (b'IEND', b'')]
  return b'\x89PNG\r\n\x1a\n' + b''.join(png_chunk(*chunk) for chunk in chunks)


def compressed_zeros(count):
  """Returns `count` zero bytes in compressed form, without allocating `count` bytes."""
  compressor = zlib.compressobj(9)
  parts = [compressor.compress(bytes(2**20)) for _ in range(count // 2**20)]
  return b''.join([*parts, compressor.compress(bytes(count % 2**20)), compressor.flush()])


def replace_by_fifo(path):
  """Replaces a file by a named pipe, so that opening it for reading blocks."""
  path.unlink()
  os.mkfifo(path)


def write_tfds(root, name, features, splits):
  """Writes the TFDS dataset `name`, with `splits` {split: examples}, without TensorFlow."""
  import tensorflow_datasets as tfds  # Imported here because it is slow.

  folder = root / name / '1.0.0'
  folder.mkdir(parents=True)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=name, version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name=''
  )
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
  file_format = tfds.core.FileFormat.from_value('array_record')
  writer = tfds.core.SequentialWriter(info, 1000, file_format=file_format)
  writer.initialize_splits(list(splits))
  # The writer reads the image streams to their end, so each split gets a copy.
  writer.add_examples({split: copy.deepcopy(items) for split, items in splits.items()})
  writer.close_all()
