"""The layout of WORKDIR: config.json, class names, names of results, atomic writes."""

import contextlib
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from farmer_jax import config as config_lib
from farmer_jax.errors import WorkdirError

CONFIG_FILE = 'config.json'
_CLASSES_FILE = 'classes.json'


def claim(config: config_lib.Config, path: epath.PathLike) -> epath.Path:
  """Creates the workdir of a run, or opens it if it belongs to a run with this configuration.

  Writes config.json and returns the absolute path. Writes nothing to a folder that is refused.

  Raises:
    WorkdirError: the folder belongs to a run with another configuration, contains other files, or
      is not writable.
  """
  workdir = absolute(path)
  file = workdir / CONFIG_FILE
  try:
    if file.exists():
      _check_same_config(config, workdir)
    elif workdir.exists() and any(workdir.iterdir()):
      raise WorkdirError(
        f'the workdir {workdir} has files but no {CONFIG_FILE}, so it is not the workdir of a run;'
        ' choose another --workdir'
      )
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(config_lib.to_dict(config), indent=2) + '\n')
  except OSError as error:
    raise WorkdirError(
      f'cannot write to the workdir {workdir} ({error.strerror or error}); choose another --workdir'
    ) from error
  return workdir


def open_run(config: config_lib.Config, path: epath.PathLike) -> epath.Path:
  """Returns the absolute path of an existing run with this configuration. Writes nothing.

  Raises:
    WorkdirError: there is no run, or it has another configuration.
  """
  workdir = absolute(path)
  _check_same_config(config, workdir)
  return workdir


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path. URLs such as gs://bucket/run are absolute."""
  path = epath.Path(path)
  return path if '://' in str(path) else epath.Path(path.expanduser().absolute())


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
  """Returns the configuration of a run as a nested dict, or raises `WorkdirError`."""
  file = absolute(workdir) / CONFIG_FILE
  if not file.exists():
    raise WorkdirError(f'{workdir} is not the workdir of a run: it has no {CONFIG_FILE}')
  return read_json(file, lambda values: isinstance(values, dict))


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


def results_name(prefix: object, section: Any, ignored: Collection[str]) -> str:
  """Returns a file name for results: a prefix, and the settings that differ from the defaults.

  `ignored` are the paths in `section`, such as a `config.Sampling`, that do not change results.
  """
  words = [str(prefix)]
  for path, key in config_lib.leaves(type(section)):
    value = config_lib.get(section, path)
    if path not in ignored and value != key.default:
      words.append(f'{path.rpartition(".")[2]}={value}')
  name = re.sub(r'[^\w.,=+-]', '_', '-'.join(words))
  return name if len(name) <= 150 else f'{name[:140]}-{short_hash(name)}'


def short_hash(value: object) -> str:
  """Returns the CRC-32 of the text of a value, as eight hexadecimal digits."""
  return f'{zlib.crc32(str(value).encode()):08x}'


def write_class_names(workdir: epath.Path, names: Sequence[str]) -> None:
  """Saves the class names in the workdir, for jobs on machines without the dataset."""
  if names:
    write_atomically(workdir / _CLASSES_FILE, json.dumps(list(names)) + '\n')


def read_class_names(workdir: epath.Path) -> tuple[str, ...]:
  """Returns the class names of a run, or () if the dataset has none."""
  file = workdir / _CLASSES_FILE
  if not file.exists():
    return ()
  return tuple(read_json(file, lambda v: isinstance(v, list) and set(map(type, v)) <= {str}))


def write_atomically(file: epath.Path, text: str) -> None:
  """Writes a text file. Readers see the complete old or new file, even after a crash."""
  with atomic_path(file) as temporary:
    temporary.write_text(text)


@contextlib.contextmanager
def atomic_path(file: epath.Path) -> Iterator[epath.Path]:
  """Context with a temporary path that replaces `file`, unless the context raises an exception."""
  temporary = file.with_name(file.name + '.tmp')
  yield temporary
  temporary.replace(file)


def differences(
  config: config_lib.Config, saved: dict[str, Any], prefixes: Iterable[str] = ('',)
) -> list[str]:
  """Describes the settings that affect results and differ from a saved configuration.

  Only settings whose dotted path starts with one of the `prefixes` are compared. `saved` is a
  result of `read_config`.
  """
  # Earlier versions saved some keys under other names.
  old = dict(_flatten(config_lib.upgrade(saved)))
  found = []
  for path, key in config_lib.leaves():
    # If the saved configuration lacks a key, the run had the default behavior.
    before, now = old.get(path, key.default), config_lib.get(config, path)
    if before != now and path.startswith(tuple(prefixes)) and not key.changeable:
      found.append(f'{path} is {before!r} there and {now!r} here')
  return found


def _check_same_config(config: config_lib.Config, workdir: epath.Path) -> None:
  found = differences(config, read_config(workdir))
  if found:
    raise WorkdirError(
      f'the workdir {workdir} belongs to a run with another configuration ({"; ".join(found)});'
      ' choose another --workdir, or use the settings of that run'
    )


def _flatten(tree: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value
