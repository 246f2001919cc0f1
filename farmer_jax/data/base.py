"""What every source of images is: a random-access sequence of examples, and how one is split."""

import concurrent.futures
import dataclasses
import hashlib
import zlib

import numpy as np
import tqdm

from farmer_jax.errors import ConfigError

SPLITS = ('train', 'valid')

# Sources whose decoded images take less than this are decoded once, into one array.
IN_MEMORY_BYTES = 2**30

# Seconds of reading after which a progress bar appears.
_PROGRESS_DELAY = 3.0


class BadExampleError(ConfigError):
  """An example that cannot be read.

  Attributes:
    name: the file or record.
    reason: what is wrong with it, in a few words.
    advice: what to do about it.
  """

  def __init__(self, name, reason, advice='remove it or repair it'):
    super().__init__(name, reason, advice)  # As arguments: pickled between processes.
    self.name, self.reason, self.advice = name, reason, advice

  def __str__(self):
    return f'{self.name} cannot be read ({self.reason}); {self.advice}'


class Source:
  """A random-access sequence of examples `{'image': uint8 [H, W, C], 'label': int32 []}`.

  Subclasses define `__len__`, `__getitem__` and `class_names`, which is empty where the names are
  unknown or labels are not used. `__getitem__` raises BadExampleError for an example that is
  damaged or gone.
  """

  class_names: tuple[str, ...]

  def __len__(self):
    raise NotImplementedError

  def __getitem__(self, index):
    raise NotImplementedError

  def name(self, index):
    """What to call an example in messages; does not read it."""
    return f'example {index}'

  def gather(self, indices):
    """The examples at `indices` [B], as `{'image': uint8 [B, H, W, C], 'label': int32 [B]}`."""
    return stack([self[int(index)] for index in indices])


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(Source):
  """Examples that are in memory."""

  images: np.ndarray  # uint8 [N, H, W, C]
  labels: np.ndarray  # int32 [N]
  class_names: tuple[str, ...] = ()

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return {'image': self.images[index], 'label': self.labels[index]}

  def gather(self, indices):
    """One fancy index instead of a Python loop over the examples."""
    return {'image': self.images[indices], 'label': self.labels[indices]}


def stack(examples):
  """A batch, `{'image': uint8 [B, H, W, C], 'label': int32 [B]}`, of a list of examples."""
  return {
    'image': np.stack([example['image'] for example in examples]),
    'label': np.array([example['label'] for example in examples], np.int32),
  }


def contents(source):
  """A number that tells the images of a source from others that go by the same name: of all of them
  where they are in memory, else of a few."""
  if isinstance(source, ArraySource):
    return zlib.crc32(source.images.tobytes())
  chosen = np.unique(np.linspace(0, len(source) - 1, 32).astype(int))
  return zlib.crc32(source.gather(chosen)['image'].tobytes(), len(source))


def fits_in_memory(count, data):
  """Whether `count` decoded images are few enough to be kept as one array."""
  return count * data.image_size**2 * data.channels < IN_MEMORY_BYTES


def in_memory(source, data, description):
  """`source` itself, or an `ArraySource` of the same examples where they are small enough."""
  if not fits_in_memory(len(source), data):
    return source
  shape = (data.image_size, data.image_size, data.channels)
  images = np.empty((len(source), *shape), np.uint8)
  labels = np.empty(len(source), np.int32)
  examples = parallel_map(source.__getitem__, range(len(source)), data.threads, description)
  for index, example in enumerate(examples):
    images[index], labels[index] = example['image'], example['label']
  return ArraySource(images, labels, tuple(source.class_names))


def parallel_map(function, items, threads, description):
  """Yields `function(item)` in the order of `items`, computed by `threads` threads.

  A progress bar shows on a terminal's stderr once it takes long. Items are handed out in blocks, so
  that a million of them does not mean a million pending results.
  """
  block = 32 * max(1, threads)
  progress = tqdm.tqdm(
    total=len(items), desc=description, delay=_PROGRESS_DELAY, disable=None, leave=False
  )
  with progress, concurrent.futures.ThreadPoolExecutor(max(1, threads)) as executor:
    for start in range(0, len(items), block):
      for result in executor.map(function, items[start : start + block]):
        progress.update()
        yield result


def stratified_order(keys, labels):
  """A fixed order in which every prefix holds the classes in about their overall proportions.

  Within a class, examples are ordered by a hash of their key. The order so depends on the names
  alone: not on the order in which a disk lists them, and hardly on which others there are.

  Args:
    keys: N distinct strings.
    labels: integers [N].

  Returns:
    int64 [N], a permutation of range(N).
  """
  hashes = [hashlib.sha256(key.encode('utf-8', 'surrogateescape')).digest() for key in keys]
  by_hash = np.array(sorted(range(len(keys)), key=hashes.__getitem__), np.int64)
  sorted_labels = np.asarray(labels)[by_hash]
  position = np.empty(len(keys))
  for label in np.unique(sorted_labels):
    members = np.flatnonzero(sorted_labels == label)
    position[members] = (np.arange(len(members)) + 0.5) / len(members)
  return by_hash[np.argsort(position, kind='stable')]


def part(keys, labels, data, split):
  """Indices of the examples in `split`, where `data.valid_fraction` of them is held out.

  Args:
    keys: N distinct strings that name the examples.
    labels: integers [N]; both parts get the classes in about equal proportions.
    data: config.Data.
    split: 'train' or 'valid'.

  Returns:
    int64 [n]. The two splits are disjoint and complete.

  Raises:
    ConfigError: the split would be empty.
  """
  order = stratified_order(keys, labels)
  held_out = round(len(order) * data.valid_fraction)
  chosen = order[:held_out] if split == 'valid' else order[held_out:]
  if not len(chosen):
    raise ConfigError(
      f'--config.data.valid_fraction={data.valid_fraction:g} of {len(order)} images leaves none for'
      f' the {split} split; {"raise" if split == "valid" else "lower"} it'
    )
  return chosen


def check_classes(data, count, what):
  """Raises ConfigError unless `data.num_classes` is 0 or the `count` of classes in `what`."""
  if data.num_classes in (0, count):
    return
  classes = {0: 'no classes', 1: '1 class'}.get(count, f'{count} classes')
  alternative = ' (0 trains without labels)' if count else ''
  raise ConfigError(
    f'{what} has {classes}, not {data.num_classes}; set'
    f' --config.data.num_classes={count}{alternative}'
  )


def label_array(labels, data):
  """`labels` as int32 [N]; all zero where the configuration trains without labels."""
  labels = np.asarray(labels, np.int32)
  return labels if data.num_classes else np.zeros_like(labels)
