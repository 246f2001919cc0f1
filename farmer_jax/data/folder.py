"""Reads a folder of image files.

    PATH/cat/1.jpg  PATH/dog/a/2.png           one subfolder per class, which can have subfolders
    PATH/1.jpg  PATH/2.png                     no classes: num_classes=0
    PATH/train/…  PATH/valid/…                 either layout, with a validation split

The label of a class is its index in the sorted class names. With `num_classes=0`, the names of
subfolders are ignored. PATH is divided into splits if it contains `train`, and otherwise only
folders named `valid`, `validation`, `val` or `test`. The first of these that exists is the
validation split. If there is none, the fraction `valid_fraction` of each class is held out for
validation, chosen by a hash of the file names.

Files with the extension of an image are read. Other files, and hidden files and folders, are
ignored.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from farmer_jax import config
from farmer_jax.data import base, images
from farmer_jax.errors import ConfigError, DataError

_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')

# Number of bad files that a warning names.
_NAMES_SHOWN = 5

_VALID_NAMES = ('valid', 'validation', 'val', 'test')


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(base.Source):
  """Image files, decoded on each access."""

  paths: tuple[pathlib.Path, ...]
  labels: base.Labels
  class_names: tuple[str, ...]
  data: config.Data

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> base.Example:
    try:
      return {'image': _decode(self.paths[index], self.data), 'label': self.labels[index]}
    except (OSError, images.BadImageError) as error:
      raise base.BadExampleError(self.name(index), _reason(error)) from error

  def name(self, index: int) -> str:
    return str(self.paths[index])


def load(data: config.Data, split: str) -> base.Source:
  """Loads the images under `data.path`.

  If the decoded images fit in memory, `load` decodes all files. Otherwise `load` checks only their
  headers, and a file is decoded on each access.

  Raises:
    ConfigError: the folder does not exist, the number of its classes is not `data.num_classes`, or
      a split would be empty.
    DataError: the folder has no images, its layout is not one of those above, or a file cannot be
      read and is not skipped (`data.bad_files`).
  """
  train, valid = _split_folders(_root(data.path))
  folder = valid if valid and split == 'valid' else train
  names = _image_names(train, warn=split == 'train')
  class_names = _class_names(train, names, data)
  if folder != train:
    names = _image_names(folder, warn=True)
  labels = _labels(folder, names, class_names)
  if valid:
    chosen = base.stratified_order(names, labels)
  else:
    chosen = base.split_indices(names, labels, data, split)
  paths = [folder / names[index] for index in chosen]
  return _readable_source(paths, labels[chosen], class_names, data)


def _root(path: str | None) -> pathlib.Path:
  if not path:
    raise ConfigError('--config.data.source=folder needs --config.data.path=FOLDER')
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    problem = 'is a file' if root.exists() else 'does not exist'
    raise ConfigError(f'--config.data.path={path} {problem}; set it to a folder of images')
  return root


def _split_folders(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
  """Returns the folder of the training images and, if it exists, of the validation images."""
  entries = _list_folder(root)
  folders = {entry.name for entry in entries if entry.is_dir()}
  has_images = any(_is_image(entry.name) for entry in entries if not entry.is_dir())
  if has_images or 'train' not in folders or not folders <= {'train', *_VALID_NAMES}:
    return root, None
  return root / 'train', next((root / name for name in _VALID_NAMES if name in folders), None)


def _image_names(folder: pathlib.Path, warn: bool) -> list[str]:
  """Returns the paths of the images below `folder`, relative to it, with '/' on every system."""
  names: list[str] = []
  ignored: list[str] = []
  pending = ['']
  while pending:
    prefix = pending.pop()
    for entry in _list_folder(folder / prefix):
      name = prefix + entry.name
      # A class folder can be a link. Deeper links are not followed, because they can form cycles.
      if entry.is_dir(follow_symlinks=not prefix):
        pending.append(f'{name}/')
      else:
        (names if _is_image(name) else ignored).append(name)
  if not names:
    raise DataError(
      f'{folder} has no images (files ending in {", ".join(_EXTENSIONS)}), only {len(ignored)}'
      ' other files; correct --config.data.path'
    )
  if ignored and warn:
    logging.warning(
      f'{folder}: ignored {len(ignored)} files without the extension of an image, such as'
      f' {min(ignored)}'
    )
  return names


def _list_folder(folder: pathlib.Path) -> list[os.DirEntry]:
  """Returns the entries of a folder that are not hidden."""
  try:
    with os.scandir(folder) as entries:
      return [entry for entry in entries if not entry.name.startswith('.')]
  except OSError as error:
    raise DataError(
      f'{folder} cannot be listed ({error.strerror}); check its permissions'
    ) from error


def _is_image(name: str) -> bool:
  return name.lower().endswith(_EXTENSIONS)


def _class_names(folder: pathlib.Path, names: Sequence[str], data: config.Data) -> tuple[str, ...]:
  """Returns the class names in the order of their labels, or () if labels are not used."""
  if not data.num_classes:
    return ()
  class_names = tuple(sorted({name.partition('/')[0] for name in names if '/' in name}))
  without_class = next((name for name in names if '/' not in name), None)
  if without_class and class_names:
    raise DataError(
      f'{folder} has class folders, but also images outside of them, such as {without_class}; move'
      ' those into a class folder, or set --config.data.num_classes=0 to train without labels'
    )
  base.check_num_classes(data, len(class_names), str(folder))
  return class_names


def _labels(
  folder: pathlib.Path, names: Sequence[str], class_names: tuple[str, ...]
) -> base.Labels:
  """Returns the class index of each image, or zeros if there are no classes."""
  if not class_names:
    return np.zeros(len(names), np.int32)
  numbers = {name: number for number, name in enumerate(class_names)}
  labels = [numbers.get(name.partition('/')[0], -1) for name in names]
  if -1 in labels:
    raise DataError(
      f'{folder / names[labels.index(-1)]} belongs to none of the classes of the training images;'
      ' move or remove it'
    )
  return np.array(labels, np.int32)


def _readable_source(
  paths: Sequence[pathlib.Path],
  labels: base.Labels,
  class_names: tuple[str, ...],
  data: config.Data,
) -> base.Source:
  """Returns a source of the readable files. Skips other files if `data.bad_files` is 'skip'."""
  if not base.fits_in_memory(len(paths), data):
    readable = [index for index, _ in _read_files(paths, _check_header, data)]
    readable_paths = tuple(paths[index] for index in readable)
    return FolderSource(readable_paths, labels[readable], class_names, data)
  pixels = np.empty((len(paths), data.image_size, data.image_size, data.channels), np.uint8)
  readable = []
  for index, image in _read_files(paths, functools.partial(_decode, data=data), data):
    pixels[len(readable)] = image
    readable.append(index)
  return base.ArraySource(pixels[: len(readable)], labels[readable], class_names)


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
