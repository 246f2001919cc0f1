"""Measures how fast the input pipeline reads JPEGs of ImageNet's size, as 256x256 crops.

    apt-get download ukui-wallpapers && dpkg -x ukui-wallpapers*.deb wallpapers
    python -m benchmarks.input --photos=wallpapers

Writes crops of about 500x400 pixels of the photographs as a folder and as a TFDS dataset in
ArrayRecord files. Processor time is summed over all threads and processes of the pipeline. On a
shared machine, processor time varies less than wall-clock time. Prints Markdown tables.
"""

import collections
import dataclasses
import functools
import io
import itertools
import multiprocessing
import os
import pathlib
import tempfile
import time

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from absl import app, flags, logging

from benchmarks import timing
from farmer_jax import config as config_lib
from farmer_jax.data import base, images, pipeline, sources
from tests.support import data as data_lib

_PHOTOS = flags.DEFINE_string('photos', None, 'Folder of photographs.', required=True)
_COUNT = flags.DEFINE_integer('count', 512, 'Number of images to write.')
_BATCH = flags.DEFINE_integer('batch', 64, 'Images per batch.')
_BATCHES = flags.DEFINE_integer('batches', 12, 'Batches per measurement.')
_ROUNDS = flags.DEFINE_integer(
  'rounds', 5, 'Measurements per row of the table. The rows are measured in turn.'
)
_QUALITY = 95
_SIZE = 256
_TICKS = os.sysconf('SC_CLK_TCK')


def crops(folder, count):
  """Yields `count` JPEG files of 70 to 200 KB, crops of the photographs at several scales."""
  names = sorted(pathlib.Path(folder).rglob('*.jpg')) + sorted(pathlib.Path(folder).rglob('*.png'))
  photos = [PIL.Image.open(name).convert('RGB') for name in names]
  scaled = [photo.reduce(factor) for photo in photos for factor in range(1, 9)]
  scaled = [photo for photo in scaled if min(photo.size) >= 500]
  random = np.random.default_rng(0)
  while count:
    photo = scaled[random.integers(len(scaled))]
    width, height = map(int, random.permutation([500, random.integers(333, 460)]))
    left, top = random.integers(photo.width - width + 1), random.integers(photo.height - height + 1)
    crop = photo.crop((left, top, left + width, top + height))
    content = data_lib.encode(crop, 'JPEG', quality=_QUALITY)
    if 70_000 < len(content) < 200_000:  # Rejects crops with little or very much detail.
      count -= 1
      yield content


def write(root, files):
  """Writes the JPEG files in two formats. Returns {format: `config.Data`}."""
  (root / 'folder').mkdir()
  for index, content in enumerate(files):
    (root / 'folder' / f'{index:04}.jpg').write_bytes(content)
  features = {'image': tfds.features.Image(shape=(None, None, 3))}
  examples = [{'image': io.BytesIO(content)} for content in files]
  data_lib.write_tfds(root, 'photos', features, {'train': examples, 'test': examples[:1]})
  common = dict(image_size=_SIZE, channels=3, num_classes=0, valid_fraction=0.01)
  return {
    'folder': config_lib.Data(source='folder', path=str(root / 'folder'), **common),
    'ArrayRecord': config_lib.Data(source='photos', path=str(root), **common),
  }


def processor_seconds():
  """Returns the processor time that this process and its children have used, in seconds."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    fields = pathlib.Path(f'/proc/{child.pid}/stat').read_text().rpartition(')')[2].split()
    total += (int(fields[11]) + int(fields[12])) / _TICKS
  return total


def measure_speed(iterator, batches):
  """Returns the images per second of processor time and of wall-clock time."""
  cpu, start = processor_seconds(), time.perf_counter()
  count = sum(len(next(iterator)['label']) for _ in range(batches))
  return count / (processor_seconds() - cpu), count / (time.perf_counter() - start)


def measure_pipelines(settings):
  """Prints the speed for each source and numbers of threads and workers."""
  logging.set_verbosity(logging.ERROR)
  lines = list(itertools.product(settings, [(1, 0), (2, 0), (1, 1), (1, 2)]))
  speeds = collections.defaultdict(list)
  for line in _ROUNDS.value * lines:
    name, (threads, workers) = line
    data = dataclasses.replace(settings[name], threads=threads, workers=workers)
    iterator = pipeline.TrainIterator(sources.load(data, 'train'), data, _BATCH.value, 0)
    measure_speed(iterator, 4)  # Warm-up: starts threads and workers.
    speeds[line].append(measure_speed(iterator, _BATCHES.value))
    iterator.close()
  print()
  columns = 'source', 'threads', 'workers', 'images/s of processor time', 'images/s'
  timing.print_table(
    dict(zip(columns, (name, *counts, *np.median(values, 0).round().astype(int)), strict=True))
    for (name, counts), values in speeds.items()
  )


def decode_only(content):
  """Decodes without resizing."""
  with PIL.Image.open(io.BytesIO(content)) as image:
    image.load()
    return image


def decode_reduced(content):
  """Like `images.decode`, but the JPEG decoder halves large images instead of a box filter."""
  with PIL.Image.open(io.BytesIO(content)) as image:
    image.draft('RGB', (_SIZE, _SIZE))
    return np.array(images.fit(image.convert('RGB'), _SIZE))


def measure_decoding(files, title):
  """Prints the processor time of decoding alone, and of decoding and resizing in two ways."""
  decode = functools.partial(images.decode, size=_SIZE, channels=3)
  steps = {
    'decoding alone': decode_only,
    'decoding, cropping, resizing': decode,
    "decoding, cropping, resizing with the decoder's reduction": decode_reduced,
  }

  def decode_all(step):
    return [step(content) for content in files]

  calls = {name: functools.partial(decode_all, step) for name, step in steps.items()}
  times = timing.medians(calls, _ROUNDS.value, time.process_time)
  print()
  timing.print_table(
    {
      title: name,
      'ms of processor time per image': f'{1e3 * seconds / len(files):.2f}',
      'images/s': f'{len(files) / seconds:.0f}',
    }
    for name, seconds in times.items()
  )
  exact, reduced = (np.float64(decode_all(step)) for step in (decode, decode_reduced))
  error = np.sqrt(np.mean((exact - reduced) ** 2))
  print(f'\nRoot mean square difference of the two results: {error:.2f} of 255 levels.')


def main(_):
  """Writes the files and prints the measurements."""
  files = list(crops(_PHOTOS.value, _COUNT.value))
  sizes = np.array([len(content) for content in files])
  print(f'{len(files)} JPEGs, quality {_QUALITY}, mean size {sizes.mean() / 1e3:.0f} KB')
  measure_decoding(files[:128], 'JPEGs of the size of ImageNet images')
  large = []
  for content in files[:32]:  # The short side becomes at least 2 * _SIZE.
    image = decode_only(content)
    image = image.resize((2 * image.width, 2 * image.height))
    large.append(data_lib.encode(image, 'JPEG', quality=_QUALITY))
  measure_decoding(large, 'JPEGs of twice this width and height')
  base.IN_MEMORY_BYTES = 0  # Images are decoded on each access, like ImageNet.
  with tempfile.TemporaryDirectory() as root:
    measure_pipelines(write(pathlib.Path(root), files))


if __name__ == '__main__':
  app.run(main)
