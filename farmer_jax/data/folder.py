"""Reads a folder of image files, with a layout of `folder_layout`.

The label of a class is its index in the sorted class names, or in the class names of a run. Names
are sorted by the code points of their characters: '10' comes before '2'. With `num_classes=0`, the
names of subfolders are ignored. Without a validation folder, the fraction `valid_fraction` of each
class is held out for validation, chosen by a hash of the file names.

Files with the extension of an image are read. Other files, hidden files and folders, and folders of
file managers and storage systems are ignored.
"""

import dataclasses
import functools
import os
import pathlib
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from farmer_jax import config
from farmer_jax.data import base, folder_layout, images
from farmer_jax.errors import ConfigError, DataError

# Number of bad files that a warning names.
_NAMES_SHOWN = 5


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(base.Source):
  """Image files, decoded on each access."""

  paths: tuple[pathlib.Path, ...]
  labels: base.Labels
  class_names: tuple[str, ...]
  data: config.Data
  origin: base.Origin

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> base.Example:
    try:
      return {'image': _decode(self.paths[index], self.data), 'label': self.labels[index]}
    except (OSError, images.BadImageError) as error:
      raise base.BadExampleError(self.name(index), _reason(error)) from error

  def name(self, index: int) -> str:
    return str(self.paths[index])


def load(data: config.Data, split: str, class_names: Sequence[str] = ()) -> base.Source:
  """Loads the images under `data.path`.

  If the decoded images fit in memory, `load` decodes all files. Otherwise `load` checks only their
  headers, and a file is decoded on each access. See `sources.load` for `class_names`.

  Raises:
    ConfigError: the folder does not exist, the number of its classes is not `data.num_classes`, or
      a split would be empty.
    DataError: the folder has no images, its layout is ambiguous, it has a class that is not in
      `class_names`, or a file cannot be read and is not skipped (`data.bad_files`).
  """
  splits = folder_layout.find_splits(_root(data.path), data)
  folder = splits.valid if splits.valid and split == 'valid' else splits.train
  names, ignored = _image_names(splits.train, data)
  found = _class_names(splits.train, names, data, bool(class_names))
  if folder != splits.train:
    names, ignored = _image_names(folder, data)
  known = tuple(class_names) if found and class_names else found
  labels = _labels(folder, names, known, found, data)
  if splits.valid:
    chosen = base.stratified_order(names, labels)
  else:
    chosen = base.split_indices(names, labels, data, split)
  chosen = chosen[labels[chosen] >= 0]
  chosen_names = [names[index] for index in chosen]
  origin = base.Origin(
    _printable(str(folder)), tuple(_content(folder, chosen_names)), (*splits.ignored, *ignored)
  )
  paths = [folder / name for name in chosen_names]
  return _readable_source(paths, labels[chosen], known, data, origin)


def _root(path: str | None) -> pathlib.Path:
  if not path:
    raise ConfigError('--config.data.source=folder needs --config.data.path=FOLDER')
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    problem = 'is a file' if root.exists() else 'does not exist'
    problem = 'is in an object store, from which images are not read' if '://' in path else problem
    raise ConfigError(f'--config.data.path={path} {problem}; set it to a folder of images')
  return root


def _image_names(folder: pathlib.Path, data: config.Data) -> tuple[list[str], list[str]]:
  """Returns the paths of the images below `folder`, relative to it, with '/' on every system.

  Also returns descriptions of the files and folders that are ignored.
  """
  names: list[str] = []
  other_files: list[str] = []
  ignored: list[str] = []
  pending = ['']
  while pending:
    prefix = pending.pop()
    try:
      entries = folder_layout.list_folder(folder / prefix, ignored)
    except DataError as error:
      if not prefix or data.bad_files == 'stop':
        raise
      ignored.append(str(error))
      continue
    # A class folder can be a link. Deeper links are not followed, because they can form cycles.
    folders = [e.name for e in entries if e.is_dir(follow_symlinks=not prefix)]
    if prefix:
      folder_layout.check_no_splits_below(folder / prefix, folders, data)
    pending += [f'{prefix}{name}/' for name in folders]
    for name in {entry.name for entry in entries}.difference(folders):
      (names if folder_layout.is_image(name) else other_files).append(prefix + name)
  if not names:
    raise DataError(
      f'{folder} has no images (files ending in {", ".join(folder_layout.EXTENSIONS)}), only'
      f' {len(other_files)} other files; correct --config.data.path'
    )
  if other_files:
    number = f'{len(other_files)} files' if len(other_files) > 1 else '1 file'
    ignored.append(f'{number} without the extension of an image, such as {min(other_files)}')
  return names, sorted(set(map(_printable, ignored)))


def _class_of(name: str) -> str:
  """Returns the class of the image with this relative path, or '' if it is in no subfolder.

  Some systems store an accented letter as one character and others as two. Both are equal here.
  """
  folder, slash, _ = name.partition('/')
  return unicodedata.normalize('NFC', _printable(folder)) if slash else ''


def _printable(name: str) -> str:
  """Returns a name in which bytes that are not UTF-8 are written as escape sequences."""
  return os.fsencode(name).decode('utf-8', 'backslashreplace')


def _class_names(
  folder: pathlib.Path, names: Sequence[str], data: config.Data, can_lack_classes: bool
) -> tuple[str, ...]:
  """Returns the names of the class folders, sorted, or () if labels are not used."""
  if not data.num_classes:
    return ()
  class_names = tuple(sorted(set(map(_class_of, names)) - {''}))
  without_class = next((name for name in names if '/' not in name), None)
  if without_class and class_names:
    raise DataError(
      f'{folder} has class folders, but also images outside of them, such as {without_class}; move'
      ' those into a class folder, or set --config.data.num_classes=0 to train without labels'
    )
  if not (class_names and can_lack_classes):
    base.check_num_classes(data, len(class_names), str(folder))
  return class_names


def _labels(
  folder: pathlib.Path,
  names: Sequence[str],
  known: tuple[str, ...],
  found: tuple[str, ...],
  data: config.Data,
) -> base.Labels:
  """Returns the index in `known` of the class of each image, or zeros if there are no classes.

  `found` are the classes of the training images. The label of an unknown class is -1 if such images
  are left out.
  """
  if not known:
    return np.zeros(len(names), np.int32)
  classes = list(map(_class_of, names))
  for name, class_name in zip(names, classes, strict=True):
    if class_name not in known and class_name not in found:
      raise DataError(
        f'{folder / name} belongs to none of the classes of the training images; move or remove it'
      )
  mapping = base.map_classes(sorted(set(classes)), known, data, str(folder))
  return np.array([mapping[name] for name in classes], np.int32)


def _content(folder: pathlib.Path, names: Sequence[str]) -> Iterator[str]:
  """Yields a checksum of all names, and of the bytes of some files.

  They depend neither on where the folder is nor on the library that decodes the images.
  """
  yield f'{zlib.crc32(chr(10).join(names).encode("utf-8", "surrogateescape")):08x}'
  for index in base.compared_indices(len(names)):
    path = folder / names[index]
    try:
      yield f'{zlib.crc32(path.read_bytes()):08x}' if path.is_file() else ''
    except OSError:  # The file is reported when it is decoded.
      yield ''


def _readable_source(
  paths: Sequence[pathlib.Path],
  labels: base.Labels,
  class_names: tuple[str, ...],
  data: config.Data,
  origin: base.Origin,
) -> base.Source:
  """Returns a source of the readable files. Skips other files if `data.bad_files` is 'skip'."""
  if not base.fits_in_memory(len(paths), data):
    readable = [index for index, _ in _read_files(paths, _check_header, data)]
    readable_paths = tuple(paths[index] for index in readable)
    return FolderSource(readable_paths, labels[readable], class_names, data, origin)
  pixels = np.empty((len(paths), data.image_size, data.image_size, data.channels), np.uint8)
  readable = []
  for index, image in _read_files(paths, functools.partial(_decode, data=data), data):
    pixels[len(readable)] = image
    readable.append(index)
  return base.ArraySource(pixels[: len(readable)], labels[readable], class_names, origin)


def _read_files(
  paths: Sequence[pathlib.Path], read: Callable[[pathlib.Path], Any], data: config.Data
) -> Iterator[tuple[int, Any]]:
  """Yields (index, `read(path)`) for each readable file.

  Raises:
    DataError: a file is bad and `data.bad_files` is 'stop', no file is readable, or a disk fails.
  """

  def attempt(path: pathlib.Path) -> Any:
    """Returns `read(path)`, or the exception if the file is not a readable image."""
    try:
      if not path.is_file() and path.exists():  # Opening a named pipe would block.
        raise images.BadImageError('it is not a regular file')
      return read(path)
    except (FileNotFoundError, PermissionError, images.BadImageError) as error:
      return error
    except OSError as error:  # A run must not skip files because a disk fails.
      raise DataError(f'{path} cannot be read: {_reason(error)}; check the disk') from error

  bad = []
  results = base.parallel_map(attempt, paths, data.threads, 'reading images')
  for index, result in enumerate(results):
    if not isinstance(result, Exception):
      yield index, result
    elif data.bad_files == 'stop':
      raise DataError(
        f'{paths[index]} is not a readable image: {_reason(result)}; remove it, or set'
        ' --config.data.bad_files=skip to skip such files'
      )
    else:
      bad.append(f'{paths[index]} ({_reason(result)})')
  if len(bad) == len(paths):
    raise DataError(f'none of {len(paths)} files can be read, such as {bad[0]}; replace them')
  if bad:
    more = ', …' if len(bad) > _NAMES_SHOWN else ''
    logging.warning(
      f'skipped {len(bad)} of {len(paths)} files because they are not readable images:'
      f' {", ".join(bad[:_NAMES_SHOWN])}{more}'
    )


def _check_header(path: pathlib.Path) -> None:
  with path.open('rb') as stream:
    images.check_header(stream)


def _decode(path: pathlib.Path, data: config.Data) -> images.Pixels:
  return images.decode(path.read_bytes(), data.image_size, data.channels)


def _reason(error: Exception) -> str:
  """Returns the error message without the path that Python appends to it."""
  return getattr(error, 'strerror', None) or str(error)
