"""The folder that a run lives in."""

import contextlib
import json
import re
import zlib

from etils import epath

from farmer_jax import config as config_lib
from farmer_jax import errors

CONFIG_FILE = 'config.json'
_CLASSES_FILE = 'classes.json'


def prepare(config, path):
  """Claims `path` for a run with `config`, or recognises it as this very run's.

  Writes `config.json` if the folder is new. A folder of another configuration, or one that holds
  something else, is refused with `ConfigError`, and nothing in it is touched.

  Returns:
    The folder, an absolute `epath.Path`.
  """
  workdir = absolute(path)
  file = workdir / CONFIG_FILE
  try:
    if file.exists():
      _refuse_other_config(config, workdir, read_config(workdir))
    else:
      _refuse_foreign(workdir)
      workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(config_lib.to_dict(config), indent=2) + '\n')
  except OSError as error:
    raise errors.ConfigError(
      f'cannot write to the workdir {workdir} ({error.strerror or error}); choose another --workdir'
    ) from error
  return workdir


def open_run(config, path):
  """The folder of the run at `path`, made with the model and data of `config`; nothing is written.

  Raises:
    ConfigError: there is no run, or it was made with another configuration.
  """
  workdir = absolute(path)
  _refuse_other_config(config, workdir, read_config(workdir))
  return workdir


def absolute(path):
  """`path` as an absolute `epath.Path`; URLs such as gs://bucket/run already are."""
  path = epath.Path(path)
  return path if '://' in str(path) else epath.Path(path.expanduser().absolute())


def read_config(workdir):
  """The configuration that the run in `workdir` was made with, a nested dict."""
  file = absolute(workdir) / CONFIG_FILE
  if not file.exists():
    raise errors.ConfigError(f'{workdir} is not a run: it has no {CONFIG_FILE}')
  return read_json(file, lambda values: isinstance(values, dict))


def read_json(file, is_sound):
  """What a JSON file holds, if `is_sound` of it; anything else is a `ConfigError`."""
  try:
    value = json.loads(file.read_text())
    if is_sound(value):
      return value
    raise ValueError('it holds something else')
  except RecursionError:
    raise errors.ConfigError(f'cannot read {file}: it is nested too deeply') from None
  except (ValueError, OSError) as error:
    raise errors.ConfigError(f'cannot read {file}: {error}') from error


def results_name(beginning, settings, ignored):
  """A name for results: a beginning and those settings that differ from their defaults.

  Args:
    beginning: of the name.
    settings: a section of the configuration.
    ignored: paths in it that have no say in what the results are.
  """
  words = [str(beginning)]
  for path, field in config_lib.leaves(type(settings)):
    value = config_lib.get(settings, path)
    if path not in ignored and value != field.default:
      words.append(f'{path.rpartition(".")[2]}={value}')
  name = re.sub(r'[^\w.,=+-]', '_', '-'.join(words))
  return name if len(name) <= 150 else f'{name[:140]}-{fingerprint(name)}'


def fingerprint(value):
  """Eight characters that tell values apart, by how they are written."""
  return f'{zlib.crc32(str(value).encode()):08x}'


def write_class_names(workdir, names):
  """Keeps the names of the classes with the run, for machines that do not have its data."""
  if names:
    write_atomically(workdir / _CLASSES_FILE, json.dumps(list(names)) + '\n')


def read_class_names(workdir):
  """The names of the classes; empty where they are unknown."""
  file = workdir / _CLASSES_FILE

  def are_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)

  return tuple(read_json(file, are_names)) if file.exists() else ()


def write_atomically(file, text):
  """Writes `text` as `replacing` does."""
  with replacing(file) as temporary:
    temporary.write_text(text)


@contextlib.contextmanager
def replacing(file):
  """A path to write to in place of `file`, put there at the end: a reader, or a crash, sees the old
  file or the new one, whole."""
  temporary = file.with_name(file.name + '.tmp')
  yield temporary
  temporary.replace(file)


def _refuse_foreign(workdir):
  if not workdir.exists():
    return
  if not workdir.is_dir():
    raise errors.ConfigError(f'the workdir {workdir} is a file; choose another --workdir')
  if any(workdir.iterdir()):
    raise errors.ConfigError(
      f'the workdir {workdir} holds files but no {CONFIG_FILE}, so it is not a run of this program;'
      ' choose another --workdir'
    )


def _refuse_other_config(config, workdir, saved):
  """Raises if `config` differs from `saved` in a key that decides what is computed."""
  found = differences(config, saved)
  if found:
    raise errors.ConfigError(
      f'the workdir {workdir} holds a run with another configuration ({"; ".join(found)});'
      ' choose another --workdir, or the settings of that run'
    )


def differences(config, saved, keys=('',)):
  """Where a configuration differs from a saved one in what decides about results, in words.

  Args:
    config: a `config.Config`.
    saved: a nested dict, as `read_config` returns it.
    keys: beginnings of the dotted paths to look at.
  """
  old = dict(_flatten(saved))
  found = []
  for path, field in config_lib.leaves():
    # A key that did not exist when the run was made had its default's effect.
    was, is_now = old.get(path, field.default), config_lib.get(config, path)
    if was != is_now and path.startswith(tuple(keys)) and not field.metadata['changeable']:
      found.append(f'{path} is {was!r} there and {is_now!r} here')
  return found


def _flatten(tree, prefix=''):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value
