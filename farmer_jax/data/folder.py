"""The user's own images, in a folder.

    PATH/cat/1.jpg  PATH/dog/a/2.png           a subfolder a class; deeper folders belong to it
    PATH/1.jpg  PATH/2.png                     no classes: num_classes=0
    PATH/train/…  PATH/valid/…                 each of the above, split by hand

Classes are numbered in the sorted order of their names. With `num_classes=0`, subfolders mean
nothing. A split by hand is a folder `train` next to one of `valid`, `validation`, `val` and `test`
(the first of these that exists), with no other folders or images beside them. Elsewhere
`valid_fraction` is held out, in proportion to the classes, by a hash of each file's name.

Files with the extension of an image are images; other files, and hidden ones, are ignored.
"""

import dataclasses
import os
import pathlib

import numpy as np
from absl import logging

from farmer_jax.data import base, images
from farmer_jax.errors import ConfigError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')

# Bad files named in the warning about them.
_NAMES_SHOWN = 5

_VALID_NAMES = ('valid', 'validation', 'val', 'test')


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(base.Source):
  """Image files that are decoded when they are read."""

  paths: tuple[pathlib.Path, ...]
  labels: np.ndarray  # int32 [N]
  class_names: tuple[str, ...]
  image_size: int
  channels: int

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, index):
    path = self.paths[index]
    try:
      image = _decode(path, self.image_size, self.channels)
    except (OSError, images.BadImageError) as error:
      raise base.BadExampleError(str(path), _reason(error)) from error
    return {'image': image, 'label': self.labels[index]}

  def name(self, index):
    return str(self.paths[index])


def load(data, split):
  """The images under `data.path`, all checked.

  Those that take little memory once decoded are decoded now. Of a larger set only the headers are
  checked here, and files are decoded when they are read.

  Raises:
    ConfigError: there is no such folder, it has no images, its classes do not fit
      `data.num_classes`, or a file is no image while `data.bad_files` is 'stop'.
  """
  train, valid = _split_folders(_existing(data.path))
  folder = valid if valid and split == 'valid' else train
  names = _image_names(train, warn=split == 'train')
  class_names = _class_names(train, names, data)
  if folder != train:
    names = _image_names(folder, warn=True)
  labels = _labels(folder, names, class_names)
  if valid:
    chosen = base.stratified_order(names, labels)
  else:
    chosen = base.part(names, labels, data, split)
  paths = [folder / names[index] for index in chosen]
  return _checked_source(paths, labels[chosen], class_names, data)


def _existing(path):
  """The folder at `path`, as a pathlib.Path."""
  if not path:
    raise ConfigError('--config.data.source=folder needs --config.data.path=FOLDER')
  root = pathlib.Path(path).expanduser()
  if not root.exists():
    raise ConfigError(f'--config.data.path={path} does not exist; set it to a folder of images')
  if not root.is_dir():
    raise ConfigError(f'--config.data.path={path} is a file; set it to a folder of images')
  return root


def _split_folders(root):
  """(training folder, validation folder or None): the user's own split, or `root` itself."""
  entries = [entry for entry in _scan(root) if not entry.name.startswith('.')]
  folders = {entry.name for entry in entries if entry.is_dir()}
  loose = any(_is_image(entry.name) for entry in entries if not entry.is_dir())
  if loose or 'train' not in folders or not folders <= {'train', *_VALID_NAMES}:
    return root, None
  valid = next((root / name for name in _VALID_NAMES if name in folders), None)
  return root / 'train', valid


def _image_names(folder, warn):
  """Paths of the images below `folder`, relative to it, with '/'; ConfigError if there are none."""
  names, ignored = [], []
  pending = ['']
  while pending:
    prefix = pending.pop()
    for entry in _scan(folder / prefix):
      if entry.name.startswith('.'):
        continue
      name = prefix + entry.name
      # Folders behind a link count only as classes: one further down may lead round in circles.
      if entry.is_dir(follow_symlinks=not prefix):
        pending.append(f'{name}/')
      elif _is_image(entry.name):
        names.append(name)
      else:
        ignored.append(name)
  if not names:
    raise ConfigError(
      f'{folder} has no images (files ending in {", ".join(EXTENSIONS)}), only {len(ignored)} other'
      ' files; correct --config.data.path'
    )
  if ignored and warn:
    logging.warning(
      '%s: ignored %d files without the extension of an image, such as %s',
      folder,
      len(ignored),
      min(ignored),
    )
  return names


def _scan(folder):
  """The entries of a folder; ConfigError where it cannot be listed."""
  try:
    with os.scandir(folder) as entries:
      return list(entries)
  except OSError as error:
    raise ConfigError(
      f'{folder} cannot be listed ({error.strerror}); check its permissions'
    ) from error


def _is_image(name):
  return name.lower().endswith(EXTENSIONS)


def _class_names(folder, names, data):
  """The classes, in the order of their labels; none where the configuration trains without."""
  if not data.num_classes:
    return ()
  class_names = tuple(sorted({name.partition('/')[0] for name in names if '/' in name}))
  loose = next((name for name in names if '/' not in name), None)
  if loose and class_names:
    raise ConfigError(
      f'{folder} has class folders and, beside them, images such as {loose}; move those into a'
      ' class folder, or set --config.data.num_classes=0 to train without labels'
    )
  base.check_classes(data, len(class_names), str(folder))
  return class_names


def _labels(folder, names, class_names):
  """int32 [N]: the class of each image, 0 where there are no classes."""
  if not class_names:
    return np.zeros(len(names), np.int32)
  numbers = {name: number for number, name in enumerate(class_names)}
  unknown = next((name for name in names if name.partition('/')[0] not in numbers), None)
  if unknown:
    raise ConfigError(
      f'{folder / unknown} is in none of the classes of the training images; move or remove it'
    )
  return np.array([numbers[name.partition('/')[0]] for name in names], np.int32)


def _checked_source(paths, labels, class_names, data):
  """The source of the files at `paths`, less the bad ones if the user has them skipped."""
  if not base.fits_in_memory(len(paths), data):
    kept = [index for index, _ in _good(paths, _check_header, data)]
    paths = tuple(paths[index] for index in kept)
    return FolderSource(paths, labels[kept], class_names, data.image_size, data.channels)

  def read(path):
    return _decode(path, data.image_size, data.channels)

  pixels = np.empty((len(paths), data.image_size, data.image_size, data.channels), np.uint8)
  kept = []
  for index, image in _good(paths, read, data):
    pixels[len(kept)] = image
    kept.append(index)
  return base.ArraySource(pixels[: len(kept)], labels[kept], class_names)


def _good(paths, read, data):
  """Yields (index, `read(path)`) of the good files; a bad one stops, or is skipped and reported."""

  def attempt(path):
    try:
      if not path.is_file() and path.exists():
        return None, 'it is not a regular file'  # Of a pipe, reading would wait for ever.
      return read(path), None
    except (FileNotFoundError, PermissionError, images.BadImageError) as error:
      return None, _reason(error)
    except OSError as error:  # A failing disk is no reason to do without the files on it.
      raise ConfigError(f'{path} cannot be read: {_reason(error)}') from error

  bad = []
  results = base.parallel_map(attempt, paths, data.threads, 'reading images')
  for index, (result, problem) in enumerate(results):
    if problem is None:
      yield index, result
    elif data.bad_files == 'stop':
      raise ConfigError(
        f'{paths[index]} is no image that can be read: {problem}; remove it, or set'
        ' --config.data.bad_files=skip to skip such files'
      )
    else:
      bad.append(f'{paths[index]} ({problem})')
  if bad:
    logging.warning(
      'skipped %d of %d files that are no images that can be read: %s%s',
      len(bad),
      len(paths),
      ', '.join(bad[:_NAMES_SHOWN]),
      ', …' if len(bad) > _NAMES_SHOWN else '',
    )
  if len(bad) == len(paths):
    raise ConfigError(f'none of {len(paths)} files can be read, such as {bad[0]}; replace them')


def _check_header(path):
  with open(path, 'rb') as stream:
    images.check_header(stream)


def _decode(path, size, channels):
  with open(path, 'rb') as stream:
    return images.decode(stream.read(), size, channels)


def _reason(error):
  """What went wrong, without the path that Python adds to it."""
  return getattr(error, 'strerror', None) or str(error)
