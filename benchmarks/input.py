"""How fast images are read: JPEGs of ImageNet's kind, to 256x256 centre crops, ready as batches.

    apt-get download ukui-wallpapers && dpkg -x ukui-wallpapers*.deb wallpapers
    python -m benchmarks.input --photos=wallpapers

Cuts crops of about 500x400 pixels out of the photographs and writes them as a folder and as a TFDS
data set in ArrayRecord files. Speeds are images per second of processor time, all threads and
processes of the pipeline together: on a machine that others use as well, that drifts less than
time on the clock. Prints tables in Markdown.
"""

import collections
import dataclasses
import glob
import io
import itertools
import multiprocessing
import os
import pathlib
import tempfile
import time

import numpy as np
import PIL.Image
from absl import app, flags, logging

from farmer_jax import config as config_lib
from farmer_jax.data import base, images, pipeline, sources

_PHOTOS = flags.DEFINE_string('photos', None, 'Folder of photographs.', required=True)
_COUNT = flags.DEFINE_integer('count', 512, 'Images to make.')
_BATCH = flags.DEFINE_integer('batch', 64, 'Images a batch.')
_BATCHES = flags.DEFINE_integer('batches', 12, 'Batches of one measurement.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Measurements of each line, taken in turns.')
_QUALITY = 95
_SIZE = 256
_TICKS = os.sysconf('SC_CLK_TCK')


def crops(folder, count):
  """Yields `count` JPEG files of 70 to 200 KB, cut out of photographs at several scales."""
  names = sorted(glob.glob(f'{folder}/**/*.jpg', recursive=True))
  names += sorted(glob.glob(f'{folder}/**/*.png', recursive=True))
  photos = [PIL.Image.open(name).convert('RGB') for name in names]
  scaled = [photo.reduce(factor) for photo in photos for factor in range(1, 9)]
  scaled = [photo for photo in scaled if min(photo.size) >= 500]
  random = np.random.default_rng(0)
  while count:
    photo = scaled[random.integers(len(scaled))]
    width, height = map(int, random.permutation([500, random.integers(333, 460)]))
    left, top = random.integers(photo.width - width + 1), random.integers(photo.height - height + 1)
    stream = io.BytesIO()
    crop = photo.crop((left, top, left + width, top + height))
    crop.save(stream, 'JPEG', quality=_QUALITY)
    if 70_000 < stream.tell() < 200_000:  # Much of a wallpaper is empty.
      count -= 1
      yield stream.getvalue()


def write(root, files):
  """Writes the JPEG files twice; returns the settings that read them."""
  import tensorflow_datasets as tfds

  (root / 'folder').mkdir()
  for index, content in enumerate(files):
    (root / 'folder' / f'{index:04}.jpg').write_bytes(content)
  records = root / 'photos' / '1.0.0'
  records.mkdir(parents=True)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name='photos', version=tfds.core.Version('1.0.0'), data_dir=str(records), module_name=''
  )
  features = tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(None, None, 3))})
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  kind = tfds.core.FileFormat.from_value('array_record')
  writer = tfds.core.SequentialWriter(info, 1000, file_format=kind)
  writer.initialize_splits(['train', 'test'])
  examples = [{'image': io.BytesIO(content)} for content in files]
  writer.add_examples({'train': examples, 'test': [{'image': io.BytesIO(files[0])}]})
  writer.close_all()
  common = dict(image_size=_SIZE, channels=3, num_classes=0, valid_fraction=0.01)
  return {
    'folder': config_lib.Data(source='folder', path=str(root / 'folder'), **common),
    'ArrayRecord': config_lib.Data(source='photos', path=str(root), **common),
  }


def processor_seconds():
  """Processor time so far of this process and its children."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    fields = pathlib.Path(f'/proc/{child.pid}/stat').read_text().rpartition(')')[2].split()
    total += (int(fields[11]) + int(fields[12])) / _TICKS
  return total


def drained(iterator, batches):
  """(images a second of processor time, images a second) over the next batches."""
  cpu, start = processor_seconds(), time.perf_counter()
  count = sum(len(next(iterator)['label']) for _ in range(batches))
  return count / (processor_seconds() - cpu), count / (time.perf_counter() - start)


def measure_pipelines(settings):
  """Prints the speed of sources, threads and workers."""
  logging.set_verbosity(logging.ERROR)
  lines = list(itertools.product(settings, [(1, 0), (2, 0), (1, 1), (1, 2)]))
  speeds = collections.defaultdict(list)
  for line in _ROUNDS.value * lines:
    name, (threads, workers) = line
    data = dataclasses.replace(settings[name], threads=threads, workers=workers)
    iterator = pipeline.train_iterator(sources.load(data, 'train'), data, _BATCH.value, 0)
    drained(iterator, 4)  # Starts what has to be started.
    speeds[line].append(drained(iterator, _BATCHES.value))
    iterator.close()
  print('\n| source | threads | workers | images/s of processor time | images/s |')
  print('| --- | --- | --- | --- | --- |')
  for (name, (threads, workers)), values in speeds.items():
    by_processor, by_clock = np.median(values, 0)
    print(f'| {name} | {threads} | {workers} | {by_processor:.0f} | {by_clock:.0f} |')


def decode_only(content):
  """Pixels of the whole image."""
  with PIL.Image.open(io.BytesIO(content)) as image:
    image.load()
    return image


def decode_reduced(content):
  """As `images.decode`, with the decoder's own reduction by halves in the place of box filters."""
  with PIL.Image.open(io.BytesIO(content)) as image:
    image.draft('RGB', (_SIZE, _SIZE))
    return np.array(images.fit(image.convert('RGB'), _SIZE))


def measure_decoding(files, title):
  """Prints the processor time of decoding, of all, and of all with the decoder's reduction."""
  steps = {
    'decoding alone': decode_only,
    'decoding, cropping, resizing': lambda content: images.decode(content, _SIZE, 3),
    "the same with the decoder's reduction": decode_reduced,
  }
  times = collections.defaultdict(list)
  for _ in range(_ROUNDS.value):
    for name, step in steps.items():
      start = time.process_time()
      for content in files:
        step(content)
      times[name].append((time.process_time() - start) / len(files))
  print(f'\n| {title} | ms of processor time an image | images/s |')
  print('| --- | --- | --- |')
  for name, values in times.items():
    print(f'| {name} | {1e3 * np.median(values):.2f} | {1 / np.median(values):.0f} |')
  exact, reduced = (
    np.stack([decode(content) for content in files]).astype(float)
    for decode in (steps['decoding, cropping, resizing'], decode_reduced)
  )
  error = np.sqrt(np.mean((exact - reduced) ** 2))
  print(f'\nRoot mean square difference by the reduction: {error:.2f} of 255 levels.')


def main(argv):
  """Makes the files and measures."""
  del argv
  files = list(crops(_PHOTOS.value, _COUNT.value))
  sizes = np.array([len(content) for content in files])
  print(f'{len(files)} JPEGs, quality {_QUALITY}, mean size {sizes.mean() / 1e3:.0f} KB')
  measure_decoding(files[:128], 'JPEGs as ImageNet has them')
  large = []
  for content in files[:32]:  # The short side at least twice the crop's.
    image = decode_only(content)
    stream = io.BytesIO()
    image.resize((2 * image.width, 2 * image.height)).save(stream, 'JPEG', quality=_QUALITY)
    large.append(stream.getvalue())
  measure_decoding(large, 'The same enlarged twice')
  base.IN_MEMORY_BYTES = 0  # ImageNet does not fit.
  with tempfile.TemporaryDirectory() as root:
    measure_pipelines(write(pathlib.Path(root), files))


if __name__ == '__main__':
  app.run(main)
