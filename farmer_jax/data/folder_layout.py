"""Finds the splits of a folder of images, and refuses folders that can be read in two ways.

    PATH/cat/1.jpg  PATH/dog/a/2.png           one subfolder per class, which can have subfolders
    PATH/1.jpg  PATH/2.png                     no classes: num_classes=0
    PATH/train/…  PATH/valid/…                 either layout, with a validation split

Names of splits are recognized without regard to case, digits and words such as "set" or "images":
`Train`, `training_set` and `train2017` are training splits, `dev`, `val-images` and `testing` are
validation splits. A validation split has precedence over a test split, which is then not used.

Beside splits, folders without images are ignored. Folders that file managers, archives and storage
systems create are ignored everywhere.
"""

import collections
import dataclasses
import os
import pathlib
import re

from farmer_jax import config
from farmer_jax.errors import DataError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')

# Folders that are not data, in lower case. Their images are thumbnails, copies or remains.
_SYSTEM_FOLDERS = frozenset(
  {
    *('__macosx', '@eadir', '#recycle', '@recycle', '@recently-snapshot', '#snapshot', '@tmp'),
    *('$recycle.bin', 'recycler', 'system volume information', 'lost+found', 'lost.dir'),
    *('found.000', '__pycache__', 'thumbnails', '_thumbs'),
  }
)

_SPLIT_WORDS = {
  'train': {'train', 'training', 'trn'},
  'valid': {'valid', 'validate', 'validation', 'val', 'dev', 'development', 'eval', 'evaluation'},
  'test': {'test', 'testing', 'tst', 'heldout', 'holdout'},
}
_FILLERS = {'', 'set', 'data', 'dataset', 'split', 'image', 'images', 'img', 'imgs', 'jpg', 'png'}


@dataclasses.dataclass(frozen=True)
class Splits:
  """The folder of the training images, of the validation images if they are separate, and others.

  `ignored` are the names of folders beside the splits that are not read.
  """

  train: pathlib.Path
  valid: pathlib.Path | None = None
  ignored: tuple[str, ...] = ()


def is_image(name: str) -> bool:
  """Returns whether a file name has the extension of an image."""
  return name.lower().endswith(EXTENSIONS)


def list_folder(folder: pathlib.Path, ignored: list[str] | None = None) -> list[os.DirEntry]:
  """Returns the entries of a folder that are neither hidden nor folders of a system.

  Appends the names of system folders to `ignored`.

  Raises:
    DataError: the folder cannot be listed.
  """
  try:
    with os.scandir(folder) as iterator:
      entries = [entry for entry in iterator if not entry.name.startswith('.')]
  except OSError as error:
    raise DataError(
      f'{folder} cannot be listed ({error.strerror}); check its permissions'
    ) from error
  if ignored is not None:
    ignored += [entry.name for entry in entries if entry.name.lower() in _SYSTEM_FOLDERS]
  return [entry for entry in entries if entry.name.lower() not in _SYSTEM_FOLDERS]


def find_splits(root: pathlib.Path, data: config.Data) -> Splits:
  """Returns the splits of the folder `root`.

  Raises:
    DataError: the folder can be read in two ways, and neither `data.layout` nor `data.num_classes`
      decides.
  """
  system_folders: list[str] = []
  entries = list_folder(root, system_folders)
  folders = sorted(entry.name for entry in entries if entry.is_dir())
  named = [name for name in folders if _mentioned_splits(name)]
  if data.layout == 'classes' or (data.layout == 'auto' and not named):
    return Splits(root)
  splits: dict[str, list[str]] = collections.defaultdict(list)
  for name in folders:
    splits[_split_of(name)].append(name)
  others = [name for name in splits[''] if _has_images(root / name)]
  loose = [entry.name for entry in entries if not entry.is_dir() and is_image(entry.name)]
  held_out = splits['valid'] or splits['test']
  can_be_splits = len(splits['train']) == 1 and len(held_out) <= 1
  if can_be_splits and (data.layout == 'splits' or not (others or loose)):
    return _splits(root, [*folders, *system_folders], splits['train'][0], held_out)
  if data.layout == 'splits':
    raise DataError(
      f'{root} has no unique training and validation split: its folders are'
      f' {_listed(folders)}; rename them to train and valid, or set --config.data.layout=classes'
    )
  if named and not splits['train'] and (lost := _lost_training_split(entries)):
    raise DataError(
      f'{root} has the split {named[0]}, and {lost}, which is not a folder; unpack it or correct'
      ' the link, or set --config.data.layout=classes'
    )
  if not (splits['train'] or _mixed(named) or (held_out and (others or loose or len(named) > 1))):
    return Splits(root)  # For example, one class "train_station", or a single folder "val".
  return _decide(root, data, splits, others, can_be_splits)


def _decide(
  root: pathlib.Path,
  data: config.Data,
  splits: dict[str, list[str]],
  others: list[str],
  can_be_splits: bool,
) -> Splits:
  """Returns the reading of an ambiguous folder that agrees with `data.num_classes`."""
  named = splits['train'] + splits['valid'] + splits['test']
  folders = sorted(splits[''] + named)
  class_folders = [name for name in folders if name in others or _has_images(root / name)]
  are_flat = not any(_class_folders(root / name) for name in folders if _mentioned_splits(name))
  can_be_classes = are_flat and data.num_classes == len(class_folders)
  agrees = can_be_splits and 0 < data.num_classes == len(_class_folders(root / splits['train'][0]))
  if can_be_classes and not agrees:
    return Splits(root)
  if agrees and not can_be_classes:
    return _splits(root, folders, splits['train'][0], splits['valid'] or splits['test'])
  raise DataError(
    f'{root} can be read in two ways: as images of the classes or groups {_listed(folders)}, all'
    ' used for training, or as a training and a validation split; set --config.data.layout=classes'
    ' for the first, or move or rename folders and images until only train and valid remain'
    + (' (--config.data.layout=splits ignores the rest)' if can_be_splits else '')
  )


def check_no_splits_below(folder: pathlib.Path, names: list[str], data: config.Data) -> None:
  """Checks that the subfolders `names` of a folder of images are not a training and another split.

  Raises:
    DataError: they are. All images would be used for training.
  """
  if data.layout != 'classes' and _mixed(names):
    raise DataError(
      f'{folder} has folders that are named like splits: {_listed(names)}; set --config.data.path'
      ' to the folder that contains train and valid, or set --config.data.layout=classes to use'
      ' all images for training'
    )


def _lost_training_split(entries: list[os.DirEntry]) -> str | None:
  """Returns the name of a packed training split, or of a broken link to one."""
  for entry in entries:
    stem, *suffixes = entry.name.lower().split('.')
    is_packed = bool({'zip', 'tar', 'tgz', '7z', 'rar'} & set(suffixes))
    is_broken_link = entry.is_symlink() and not os.path.exists(entry.path)
    if (is_packed or is_broken_link) and _split_of(stem) == 'train':
      return entry.name
  return None


def _splits(root: pathlib.Path, folders: list[str], train: str, held_out: list[str]) -> Splits:
  ignored = tuple(name for name in folders if name not in (train, *held_out))
  return Splits(root / train, root / held_out[0] if held_out else None, ignored)


def _words(name: str) -> list[str]:
  """Returns the words of a folder name without fillers: 'Training_Set2017' gives ['training']."""
  spaced = re.sub(r'([a-z])([A-Z])', r'\1 \2', name).lower()
  spaced = re.sub(r'\b(held|hold)[^a-z]*out\b', 'heldout', spaced.replace('_', ' '))
  words = (re.sub(r'(?<=.)(set|data|split|images)$', '', w) for w in re.findall('[a-z]+', spaced))
  return [word for word in words if word not in _FILLERS]


def _mentioned_splits(name: str) -> set[str]:
  """Returns the splits that occur as words of a folder name: 'cat_train' mentions 'train'."""
  return {split for word in _words(name) for split, words in _SPLIT_WORDS.items() if word in words}


def _split_of(name: str) -> str:
  """Returns the split that a folder name stands for, or '' if it has other words."""
  return ''.join(_mentioned_splits(name)) if len(_words(name)) == 1 else ''


def _mixed(names: list[str]) -> bool:
  """Returns whether folder names mention both a training split and another split."""
  mentioned = set[str]().union(*map(_mentioned_splits, names))
  return 'train' in mentioned and len(mentioned) > 1


def _class_folders(folder: pathlib.Path) -> list[str]:
  return [e.name for e in list_folder(folder) if e.is_dir() and _has_images(folder / e.name)]


def _has_images(folder: pathlib.Path) -> bool:
  """Returns whether there are images at any depth below a folder. Stops at the first one."""
  entries = list_folder(folder)
  if any(is_image(entry.name) for entry in entries if not entry.is_dir(follow_symlinks=False)):
    return True
  return any(
    _has_images(folder / entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)
  )


def _listed(names: list[str]) -> str:
  return ', '.join(names[:8]) + (f', … ({len(names)} in total)' if len(names) > 8 else '')
