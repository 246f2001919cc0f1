"""The layout of WORKDIR: config.json, class names, names of results, atomic writes.

The folder of an export (`farmer_jax.exports`) can stand in for the workdir of a run, but nothing is
written into it.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util

from farmer_jax import config as config_lib
from farmer_jax.errors import WorkdirError
from farmer_jax.workdir import hub, stores

CONFIG_FILE = 'config.json'
_CLASSES_FILE = 'classes.json'
_RUN_FILE = 'run.json'
# In config.json of an export: the version of its format, and the configuration of the run.
EXPORT_FORMAT, _EXPORT_KEY = 1, 'export_format'
_HISTORY_FILE = 'config_history.jsonl'
_LOG_SUFFIXES = ('.err', '.log', '.out')

# Keys that `config.train.extend` allows to change.
EXTENSION_KEYS = ('train.steps', 'train.extensions')


def claim(config: config_lib.Config, path: epath.PathLike, step: int = 0) -> epath.Path:
  """Creates the workdir of a run, or opens it if it belongs to a run with this configuration.

  Also opens the workdir of a run that `config` extends, see `extension`. Writes config.json and, if
  settings of the run change, adds a line to config_history.jsonl, with the `step` of the newest
  checkpoint. Returns the absolute path. Writes nothing to a folder that is refused.

  Raises:
    WorkdirError: the folder belongs to a run with another configuration, contains other files, is
      not writable, or its path contains one of the characters * ? [ ].
  """
  workdir, changed = absolute(path), check_claim(config, path, step)
  with _unwritable(workdir):
    _record_changes(workdir, changed, step)
    # Once recorded in `extensions`, `extend` must not apply to a further change of `steps`.
    train = dataclasses.replace(config.train, extend='none')
    write_json(workdir / CONFIG_FILE, config_lib.to_dict(dataclasses.replace(config, train=train)))
    if not (workdir / _RUN_FILE).exists():
      write_json(workdir / _RUN_FILE, {'id': uuid.uuid4().hex})
  return workdir


def check_claim(
  config: config_lib.Config, path: epath.PathLike, step: int = 0
) -> dict[str, tuple[Any, Any]]:
  """Raises the `WorkdirError` of `claim`, and writes nothing. Returns the settings that change."""
  workdir = absolute(path)
  check_no_pattern(workdir, '--workdir')
  if read_export(workdir):
    raise WorkdirError(
      f'{workdir} is an export, which cannot be trained further; choose another --workdir'
    )
  if (workdir / CONFIG_FILE).exists():
    saved = read_config(workdir)
    changed = {k: v for k, v in changes(config, saved).items() if k != 'train.extend'}
    extends = 'train.extensions' in changed and extension(config, saved, step) == config
    _check_same(config, saved, workdir, EXTENSION_KEYS if extends else ())
    return changed
  with _unwritable(workdir):
    is_new = not workdir.exists() or all(map(_is_harmless, workdir.iterdir()))
  if not is_new:
    raise WorkdirError(
      f'the workdir {workdir} has files but no {CONFIG_FILE}, so it is not the workdir of a run;'
      ' choose another --workdir'
    )
  return {}


@contextlib.contextmanager
def _unwritable(workdir: epath.Path) -> Iterator[None]:
  """Context in which an error of the file system is a `WorkdirError`."""
  try:
    yield
  except OSError as error:
    raise WorkdirError(
      f'cannot write to the workdir {workdir} ({error.strerror or error}); choose another --workdir'
    ) from error


def check_no_pattern(path: epath.PathLike, setting: str) -> None:
  """Raises WorkdirError if etils, Orbax or TFDS would read a path as a pattern of file names."""
  if found := set(str(path)) & set('*?[]'):
    raise WorkdirError(
      f'{setting}={path} contains {" ".join(sorted(found))}, which some libraries read as a pattern'
      ' of file names; use a path without these characters'
    )


def _is_harmless(path: epath.Path) -> bool:
  """Returns whether a launcher or a file system may have put this file into a new workdir."""
  return path.name.startswith('.') or path.name == 'lost+found' or path.suffix in _LOG_SUFFIXES


def open_run(config: config_lib.Config, path: epath.PathLike) -> epath.Path:
  """Returns the absolute path of an existing run with this configuration. Writes nothing.

  Raises:
    WorkdirError: there is no run, or it has another configuration.
  """
  workdir = absolute(path)
  # The command that extended a run does not set its extensions.
  _check_same(config, read_config(workdir), workdir, ['train.extensions'])
  return workdir


def _check_same(
  config: config_lib.Config,
  saved: dict[str, Any],
  workdir: epath.Path,
  ignored: Collection[str] = (),
) -> None:
  """Raises `WorkdirError` if the configuration of a run has other settings, except `ignored`."""
  found = differences(config, saved, ignored=ignored)
  before, now = changes(config, saved).get('train.steps', (0, 0))
  more = ''
  if len(found) == 1 and now > before > 0:
    more = ' (to continue it to more steps: --config.train.extend, see --config_help)'
  if found:
    raise WorkdirError(
      f'the workdir {workdir} belongs to a run with another configuration ({"; ".join(found)});'
      f' choose another --workdir, or use the settings of that run{more}'
    )


def extension(config: config_lib.Config, saved: dict[str, Any], step: int) -> config_lib.Config:
  """Returns the configuration with the extensions of a run that has the configuration `saved`.

  If `config.train` extends the run, the result has a new extension, from the checkpoint `step` on.
  """
  values = traverse_util.flatten_dict(saved, sep='.')
  steps, former = values.get('train.steps'), values.get('train.extensions', '')
  if not isinstance(steps, int) or not isinstance(former, str):
    return config  # `claim` refuses this configuration.
  train = dataclasses.replace(config.train, extensions=former)
  if config.train.extend != 'none' and config.train.steps > steps:
    train = train.extending(config_lib.Train(steps=steps, extensions=former), step)
  return dataclasses.replace(config, train=train)


def _record_changes(workdir: epath.Path, changed: Mapping[str, Any], step: int) -> None:
  """Adds a line to config_history.jsonl: the time, the step, and {key: [old value, new value]}."""
  if not changed:
    return
  file = workdir / _HISTORY_FILE
  lines = file.read_text() if file.exists() else ''
  now = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
  write_text(file, f'{lines}{json.dumps({"time": now, "step": step, "changed": changed})}\n')


def results_folder(config: config_lib.Config, workdir: epath.Path) -> epath.Path:
  """Returns the folder for the results of a job on a run: `config.results`, or its workdir.

  Raises:
    WorkdirError: the folder is not writable, or has results of another run, or the run is an export
      and `config.results` is not set.
  """
  if not config.results and read_export(workdir):
    raise WorkdirError(
      f'{workdir} is an export, which stays as it is; set --config.results=FOLDER for the results'
    )
  if hub.is_url(config.results or ''):
    raise WorkdirError(f'--config.results={config.results} is on the hub; give a folder')
  folder = absolute(config.results) if config.results else workdir
  check_no_pattern(folder, '--config.results')
  file, owner = folder / _RUN_FILE, {'workdir': str(workdir), 'id': run_id(workdir)}
  # The name is unique, because all processes of a job write at the same time.
  probe = folder / f'.writable-{socket.gethostname()}-{os.getpid()}'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe.write_text(json.dumps(owner) + '\n')
    if folder == workdir or file.exists():
      probe.unlink()
    else:
      probe.replace(file)
  except OSError as error:
    raise WorkdirError(
      f'cannot write results to {folder} ({error.strerror or error}); set --config.results=FOLDER'
    ) from error
  if folder != workdir and read_dict(file) != owner:
    raise WorkdirError(
      f'--config.results={folder} has results of another run ({file.name} is not {owner}); choose'
      ' another folder'
    )
  return folder


def run_id(workdir: epath.Path) -> str | None:
  """Returns the random name of a run, which a new run in the same workdir does not have.

  A run that an earlier version started has no name.
  """
  return read_dict(workdir / _RUN_FILE).get('id')


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path. URLs such as gs://bucket/run are absolute.

  Downloads hf://USER/NAME. For a file of an export, returns the folder of the export.

  Raises:
    WorkdirError: the path is in an object store that cannot be used, or the download fails.
  """
  if hub.is_url(path):
    path = hub.download(str(path))
  stores.check(path)
  path = epath.Path(path)
  if not stores.is_store(path):
    path = epath.Path(path.expanduser().absolute())
  return path.parent if path.suffix == '.safetensors' and path.is_file() else path


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
  """Returns the configuration of a run as a nested dict, or raises `WorkdirError`."""
  file = absolute(workdir) / CONFIG_FILE
  if not file.exists():
    is_checkpoint = file.parent.parent.name == 'checkpoints'
    hint = f'; it is in the workdir {file.parent.parent.parent}' if is_checkpoint else ''
    raise WorkdirError(f'{workdir} is not the workdir of a run: it has no {CONFIG_FILE}{hint}')
  values = read_dict(file)
  return _checked_export(values, file)['config'] if _EXPORT_KEY in values else values


def read_export(folder: epath.PathLike) -> dict[str, Any] | None:
  """Returns the content of config.json if a folder is an export, and otherwise None.

  See `farmer_jax.exports` for the keys. Raises `WorkdirError` if the file is not valid.
  """
  file = absolute(folder) / CONFIG_FILE
  values = read_dict(file)
  return _checked_export(values, file) if _EXPORT_KEY in values else None


def _checked_export(values: dict[str, Any], file: epath.Path) -> dict[str, Any]:
  if values[_EXPORT_KEY] != EXPORT_FORMAT:
    raise WorkdirError(
      f'{file} has {_EXPORT_KEY} {str(values[_EXPORT_KEY])[:20]!r}, and this version of farmer_jax'
      f' reads {EXPORT_FORMAT}; use the version that wrote it'
    )
  names = values.get('class_names')
  is_valid = isinstance(values.get('config'), dict) and _is_list_of_names(names)
  if not is_valid or type(values.get('step')) is not int:
    raise WorkdirError(f'cannot read {file}: an export has a config, class_names and a step')
  return values


def read_json(file: epath.Path, is_valid: Callable[[Any], bool]) -> Any:
  """Returns the value in a JSON file. Raises `WorkdirError` if it is unreadable or not valid."""
  try:
    value = json.loads(file.read_text())
    if is_valid(value):
      return value
    raise ValueError('it contains unexpected values')
  except RecursionError:
    raise WorkdirError(f'cannot read {file}: it is nested too deeply') from None
  except (ValueError, OSError) as error:
    raise WorkdirError(f'cannot read {file}: {error}') from error


def read_dict(file: epath.Path) -> dict[str, Any]:
  """Returns the dict in a JSON file, or {} if there is no file. Raises errors like `read_json`."""
  return read_json(file, lambda value: isinstance(value, dict)) if file.exists() else {}


def results_name(prefix: object, section: Any, ignored: Collection[str]) -> str:
  """Returns a file name for results: a prefix, and the settings that differ from the defaults.

  `ignored` are the paths in `section`, such as a `config.Sampling`, that do not change results.
  """
  words = [str(prefix)]
  for path, key in config_lib.leaves(type(section)):
    value = config_lib.get(section, path)
    if path not in ignored and value != key.default:
      words.append(f'{path.rpartition(".")[2]}={value}')
  text = '-'.join(words)
  name = re.sub(r'[^\w.,=+-]', '_', text)
  # Two settings must not have the same name.
  return name if name == text and len(name) <= 150 else f'{name[:140]}-{short_hash(text)}'


def short_hash(value: object) -> str:
  """Returns the CRC-32 of the text of a value, as eight hexadecimal digits."""
  return f'{zlib.crc32(str(value).encode()):08x}'


def write_class_names(workdir: epath.Path, names: Sequence[str]) -> None:
  """Saves the class names in the workdir, for jobs on machines without the dataset."""
  if names:
    write_json(workdir / _CLASSES_FILE, list(names))


def read_class_names(workdir: epath.Path) -> tuple[str, ...]:
  """Returns the class names of a run, or () if the dataset has none."""
  file = workdir / _CLASSES_FILE
  if not file.exists():
    return tuple((read_export(workdir) or {'class_names': ()})['class_names'])
  return tuple(read_json(file, _is_list_of_names))


def _is_list_of_names(value: Any) -> bool:
  return isinstance(value, list) and set(map(type, value)) <= {str}


def write_json(file: epath.Path, value: Any) -> None:
  """Writes a value as JSON. Readers see the complete old or new file, even after a crash."""
  write_text(file, json.dumps(value, indent=2) + '\n')


def write_text(file: epath.Path, text: str) -> None:
  """Writes a text file, like `write_json`."""
  with _atomic_path(file) as temporary:
    temporary.write_text(text)


def write_npz(file: epath.Path, arrays: Mapping[str, Any]) -> None:
  """Writes arrays, like `write_json`."""
  with _atomic_path(file) as temporary, temporary.open('wb') as stream:
    np.savez(stream, **arrays)


@contextlib.contextmanager
def _atomic_path(file: epath.Path) -> Iterator[epath.Path]:
  """Context with a temporary path that replaces `file` at the end. Creates missing folders."""
  if stores.is_store(file):  # An object exists only once it is complete. Folders do not exist.
    yield file
    return
  file.parent.mkdir(parents=True, exist_ok=True)
  temporary = file.with_name(file.name + '.tmp')
  yield temporary
  temporary.replace(file)


@contextlib.contextmanager
def optional_write(what: str) -> Iterator[None]:
  """Context that writes something that the job does not need. A full disk causes a warning."""
  try:
    yield
  except OSError as error:
    logging.warning(f'{what} cannot be written ({stores.describe(error)}). The job continues.')


def differences(
  config: config_lib.Config,
  saved: dict[str, Any],
  prefixes: Iterable[str] = ('',),
  ignored: Collection[str] = (),
) -> list[str]:
  """Describes the settings that affect results and differ from a saved configuration.

  Only settings whose dotted path starts with one of the `prefixes`, and is not `ignored`, are
  compared. `saved` is a result of `read_config`.
  """
  fixed = {path for path, key in config_lib.leaves() if not key.changeable} - {*ignored}
  return [
    f'{path} is {before!r} there and {now!r} here'
    for path, (before, now) in changes(config, saved).items()
    if path in fixed and path.startswith(tuple(prefixes))
  ]


def changes(config: config_lib.Config, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Returns {dotted path: (saved value, value in `config`)} of all keys with different values."""
  # Earlier versions saved some keys under other names. If the saved configuration lacks a key, the
  # run had the default behavior.
  old = traverse_util.flatten_dict(config_lib.upgrade(saved), sep='.')
  pairs = {
    path: (old.get(path, key.default), config_lib.get(config, path))
    for path, key in config_lib.leaves()
  }
  return {path: (before, now) for path, (before, now) in pairs.items() if before != now}
