"""The interface of image sources, and helpers that all sources share."""

import concurrent.futures
import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from absl import logging
from jaxtyping import Int, Int32, Int64, UInt8

from farmer_jax import config, terminal
from farmer_jax.errors import ConfigError, DataError

# A source whose decoded images take fewer bytes is decoded once, into one array.
IN_MEMORY_BYTES = 2**30

# A progress bar appears after this many seconds of reading.
_PROGRESS_DELAY = 3.0

Example = dict[str, Any]  # {'image': uint8 [H, W, C], 'label': int32 []}
Batch = dict[str, np.ndarray]  # {'image': uint8 [B, H, W, C], 'label': int32 [B]}
Images = UInt8[np.ndarray, 'L H W C']
Labels = Int32[np.ndarray, 'L']
Item = TypeVar('Item')
Result = TypeVar('Result')


class BadExampleError(DataError):
  """A file or record cannot be read.

  Args:
    name: the name of the example.
    reason: why it cannot be read.
    advice: what the user can do.
  """

  def __init__(self, name: str, reason: str, advice: str = 'remove it or repair it'):
    super().__init__(name, reason, advice)  # Pickle passes `args` to the constructor.
    self.name, self.reason, self.advice = name, reason, advice

  def __str__(self) -> str:
    return f'{self.name} cannot be read ({self.reason}); {self.advice}'


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where the images of a source come from, for the log and to recognize the images later.

  `content` has a checksum of the names of all images, and of some images. `ignored` describes files
  and folders that are not read.
  """

  folder: str = ''
  content: tuple[str, ...] = ()
  ignored: tuple[str, ...] = ()


class Source:
  """A random-access sequence of examples.

  Subclasses define `__len__`, `__getitem__` and `class_names`. `class_names` is empty if the names
  are unknown or labels are not used. Several threads may call `__getitem__` at the same time. It
  raises BadExampleError for an example that is damaged or missing.

  All examples of a source have the same shape. The modules that read batches (`pipeline`,
  `prefetching`, `reading`) make no other assumption about the arrays. Other modules assume square
  images (H = W = `data.image_size`) with C = `data.channels` of 1 or 3 (`images`, `config.Data`,
  `fits_in_memory` and `cache_in_memory` below) and 256 levels per value (`farmer_jax.noise`).
  Each image has one label in [0, `data.num_classes`), or the label 0 if there are no classes.
  """

  class_names: tuple[str, ...]
  origin: Origin = Origin()

  def __len__(self) -> int:
    raise NotImplementedError

  def __getitem__(self, index: int) -> Example:
    raise NotImplementedError

  def name(self, index: int) -> str:
    """Returns the name of an example for messages, without reading the example."""
    return f'example {index}'

  def gather(self, indices: Int[np.ndarray, 'B']) -> Batch:
    """Returns a batch of the examples at `indices`."""
    return stack([self[int(index)] for index in indices])


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(Source):
  """Examples in memory."""

  images: Images
  labels: Labels
  class_names: tuple[str, ...] = ()
  origin: Origin = Origin()

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> Example:
    return {'image': self.images[index], 'label': self.labels[index]}

  def gather(self, indices: Int[np.ndarray, 'B']) -> Batch:
    return {'image': self.images[indices], 'label': self.labels[indices]}


def stack(examples: Sequence[Example]) -> Batch:
  """Stacks examples into a batch."""
  return {
    'image': np.stack([example['image'] for example in examples]),
    'label': np.array([example['label'] for example in examples], np.int32),
  }


def fingerprint(source: Source) -> int:
  """Returns a checksum of all images of an `ArraySource`, or of 32 images of other sources."""
  if isinstance(source, ArraySource):
    return zlib.crc32(source.images.tobytes())
  images = source.gather(np.array(compared_indices(len(source))))['image']
  return zlib.crc32(images.tobytes(), len(source))


def describe(source: Source) -> dict[str, Any]:
  """Describes a source: the number of images, in each class if it is known, and their origin."""
  description = {'images': len(source), 'classes': _class_counts(source)}
  description |= dataclasses.asdict(source.origin)
  return description | {'content': list(source.origin.content or _content(source))}


def is_same_content(first: Sequence[str], second: Sequence[str]) -> bool:
  """Compares the `content` of two descriptions.

  Half of the compared images may have become unreadable, and a tenth may be damaged.
  """
  if len(first) != len(second) or first[0] != second[0]:
    return False
  pairs = list(zip(first[1:], second[1:], strict=True))
  unreadable = sum(a != b and '' in (a, b) for a, b in pairs)
  others = sum(a != b and '' not in (a, b) for a, b in pairs)
  return 2 * unreadable <= len(pairs) and 10 * others <= len(pairs)


def compared_indices(count: int) -> list[int]:
  """Returns the indices of at most 32 images whose checksums identify the images of a source."""
  return np.unique(np.linspace(0, count - 1, 32).astype(int)).tolist()


def _content(source: Source) -> Iterator[str]:
  yield str(len(source))
  for index in compared_indices(len(source)):
    try:
      yield f'{zlib.crc32(source[index]["image"].tobytes()):08x}'
    except BadExampleError:  # The pipeline reports and replaces it.
      yield ''


def summary(source: Source, split: str) -> str:
  """Describes a source in one line, for the log."""
  text = f'{len(source)} images in the {split} split'
  if source.origin.folder:
    text += f', from {source.origin.folder}'
  if counts := [f'{name} {count}' for name, count in _class_counts(source).items()]:
    text += f'; classes: {", ".join(counts[:20])}'
    text += f', … ({len(counts)} in total)' if len(counts) > 20 else ''
  if source.origin.ignored:
    text += f'; ignored: {", ".join(source.origin.ignored)}'
  return f'{text}.'


def _class_counts(source: Source) -> dict[str, int]:
  labels = getattr(source, 'labels', None)
  if labels is None:
    return {}
  counts = np.bincount(labels, minlength=len(source.class_names)).tolist()
  return dict(zip(source.class_names, counts, strict=False))


@dataclasses.dataclass(frozen=True, eq=False)
class _RelabeledSource(Source):
  """A source whose labels are replaced by `new_labels[label]`."""

  source: Source
  new_labels: Labels
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Example:
    example = self.source[index]
    return {**example, 'label': self.new_labels[example['label']]}

  def name(self, index: int) -> str:
    return self.source.name(index)


def with_classes(source: Source, class_names: tuple[str, ...], data: config.Data) -> Source:
  """Returns the source with the labels of `class_names`. See `sources.load`.

  Raises:
    DataError: the source has another class, and `data.unknown_classes` is 'stop' or the source
      reads its labels only on access.
  """
  if not class_names or source.class_names in ((), class_names):
    return source
  where = f'--config.data.source={data.source}'
  if not isinstance(source, ArraySource):
    data = dataclasses.replace(data, unknown_classes='stop')
  mapping = map_classes(source.class_names, class_names, data, where)
  new_labels = np.array([mapping[name] for name in source.class_names], np.int32)
  if not isinstance(source, ArraySource):
    return _RelabeledSource(source, new_labels, class_names)
  labels = new_labels[source.labels]
  return ArraySource(source.images[labels >= 0], labels[labels >= 0], class_names)


def map_classes(
  found: Sequence[str], known: Sequence[str], data: config.Data, where: str
) -> dict[str, int]:
  """Maps the class names that were found to their indices in `known`, or to -1 if left out.

  Raises:
    DataError: a class is unknown and `data.unknown_classes` is 'stop', or all classes are unknown.
  """
  unknown = [name for name in found if name not in known]
  if unknown and (data.unknown_classes == 'stop' or len(unknown) == len(found)):
    raise DataError(
      f'{where} has classes that the run does not know: {", ".join(unknown[:8])} (the run knows'
      f' {", ".join(known[:8])}{", …" if len(known) > 8 else ""}); correct the names, or set'
      ' --config.data.unknown_classes=leave_out to leave out these images'
    )
  if unknown:
    logging.warning(f'{where}: left out images of unknown classes: {", ".join(unknown)}.')
  return {name: known.index(name) if name in known else -1 for name in found}


def fits_in_memory(count: int, data: config.Data) -> bool:
  """Returns whether `count` decoded images take fewer than `IN_MEMORY_BYTES`."""
  return count * data.image_size**2 * data.channels < IN_MEMORY_BYTES


def cache_in_memory(source: Source, data: config.Data, description: str) -> Source:
  """Reads `source` into an `ArraySource` if it fits in memory. Otherwise returns `source`."""
  if not fits_in_memory(len(source), data):
    return source
  images = np.empty((len(source), data.image_size, data.image_size, data.channels), np.uint8)
  labels = np.empty(len(source), np.int32)
  examples = parallel_map(source.__getitem__, range(len(source)), data.threads, description)
  for index, example in enumerate(examples):
    images[index], labels[index] = example['image'], example['label']
  return ArraySource(images, labels, source.class_names)


def parallel_map(
  function: Callable[[Item], Result], items: Sequence[Item], threads: int, description: str
) -> Iterator[Result]:
  """Yields `function(item)` in the order of `items`, computed in `threads` threads.

  A progress bar appears after a few seconds.
  """
  # `executor.map` submits all its items at once. Blocks limit the number of pending results.
  block = 32 * threads
  with (
    concurrent.futures.ThreadPoolExecutor(threads) as executor,
    terminal.progress_bar(description, 'image', len(items), delay=_PROGRESS_DELAY) as bar,
  ):
    for start in range(0, len(items), block):
      for result in executor.map(function, items[start : start + block]):
        bar.update()
        yield result


def check_num_classes(data: config.Data, count: int, where: str) -> None:
  """Raises ConfigError unless `data.num_classes` is 0 or `count`, the number of classes."""
  if data.num_classes in (0, count):
    return
  classes = {0: 'no classes', 1: '1 class'}.get(count, f'{count} classes')
  alternative = ' (0 trains without labels)' if count else ''
  raise ConfigError(
    f'{where} has {classes}, not {data.num_classes}; set'
    f' --config.data.num_classes={count}{alternative}'
  )


def stratified_order(keys: Sequence[str], labels: Int[np.ndarray, 'L']) -> Int64[np.ndarray, 'L']:
  """Returns a permutation in which every prefix has about the class proportions of all examples.

  Examples of one class are sorted by a hash of their keys. Keys are distinct. The order therefore
  does not depend on the order in which a disk lists files, and changes little when files are added.
  """
  hashes = [hashlib.sha256(key.encode('utf-8', 'surrogateescape')).digest() for key in keys]
  by_hash = np.array(sorted(range(len(keys)), key=hashes.__getitem__), np.int64)
  sorted_labels = np.asarray(labels)[by_hash]
  position = np.empty(len(keys))
  for label in np.unique(sorted_labels):
    members = np.flatnonzero(sorted_labels == label)
    position[members] = (np.arange(len(members)) + 0.5) / len(members)
  return by_hash[np.argsort(position, kind='stable')]


def split_indices(
  keys: Sequence[str], labels: Int[np.ndarray, 'L'], data: config.Data, split: str
) -> Int64[np.ndarray, 'n']:
  """Returns the indices of the examples of `split`. 'valid' is the fraction `data.valid_fraction`.

  The splits 'train' and 'valid' are disjoint, together contain all examples, and have about the
  same class proportions. `keys` are distinct strings that name the examples.

  Raises:
    ConfigError: the split would be empty.
  """
  order = stratified_order(keys, labels)
  held_out = round(len(order) * data.valid_fraction)
  chosen = order[:held_out] if split == 'valid' else order[held_out:]
  if not len(chosen):
    raise ConfigError(
      f'--config.data.valid_fraction={data.valid_fraction:g} of {len(order)} images leaves none in'
      f' the {split} split; {"raise" if split == "valid" else "lower"} it'
    )
  return chosen
