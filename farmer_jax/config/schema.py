"""Conversion between ConfigDicts, which the command line modifies, and frozen dataclasses."""

import dataclasses
import difflib
import operator
import re
import reprlib
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from farmer_jax.config import fields, renames
from farmer_jax.config.sections import Config
from farmer_jax.errors import ConfigError


def defaults() -> ml_collections.ConfigDict:
  """Returns a ConfigDict of the default values, which configuration files modify."""
  return to_config_dict(Config())


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """Converts a dataclass to a ConfigDict. Keys that are None can still be overridden."""
  result = ml_collections.ConfigDict()
  for field in dataclasses.fields(config):
    value, allowed = getattr(config, field.name), fields.parse(field).types
    if types.NoneType in allowed:
      (required_type,) = set(allowed) - {types.NoneType}
      result[field.name] = ml_collections.config_dict.placeholder(required_type)
    result[field.name] = to_config_dict(value) if dataclasses.is_dataclass(value) else value
  return result


def to_dict(config: Any) -> dict[str, Any]:
  """Converts a dataclass to a nested dict, the content of `config.json`."""
  return dataclasses.asdict(config)


def from_config_dict(values: Mapping[str, Any]) -> Config:
  """Builds the configuration from a ConfigDict or nested dict of this or an earlier version.

  Raises:
    ConfigError: a key is unknown, or a value has the wrong type or is not one of the choices.
  """
  return _build(Config, renames.upgrade(values), prefix='')


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
  keys = {field.name: fields.parse(field) for field in dataclasses.fields(cls)}
  built = {}
  for name, value in values.items():
    path, key = f'{prefix}{name}', keys.get(name)
    if key is None:
      raise ConfigError(unknown_key(path))
    if key.section is None:
      built[name] = _checked_value(path, value, key)
    elif hasattr(value, 'items'):
      built[name] = _build(key.section, value, f'{path}.')
    else:
      raise ConfigError(f'config.{path} is a section, not a value; set one of its keys')
  return cls(**built)


def _checked_value(path: str, value: Any, key: fields.Key) -> Any:
  """Converts an int to float if necessary. Raises ConfigError if the key rejects the value."""
  if float in key.types and isinstance(value, int) and not isinstance(value, bool):
    # float() raises OverflowError for huge integers. The limits are far outside the allowed range.
    value = float(max(-(2**1000), min(value, 2**1000)))
  if not isinstance(value, key.types) or (isinstance(value, bool) and bool not in key.types):
    names = ' or '.join(t.__name__ for t in key.types).replace('NoneType', 'None')
    raise ConfigError(f'config.{path} must be {names}, not {reprlib.repr(value)}')
  if key.choices and value not in key.choices:
    known = ', '.join(map(str, key.choices))
    raise ConfigError(f'config.{path} must be one of {known}, not {reprlib.repr(value)}')
  return value


def leaves(
  section: type = Config, prefix: str = '', changeable: bool = False
) -> Iterator[tuple[str, fields.Key]]:
  """Yields the dotted path and the declaration of every key, marked as `changeable` if set."""
  for field in dataclasses.fields(section):
    key = fields.parse(field)
    key = key._replace(changeable=key.changeable or changeable)
    if key.section:
      yield from leaves(key.section, f'{prefix}{field.name}.', key.changeable)
    else:
      yield prefix + field.name, key


def get(config: Any, path: str) -> Any:
  """Returns the value at a dotted path."""
  return operator.attrgetter(path)(config)


def unknown_key(path: str) -> str:
  """Returns the error message for an unknown key. It suggests a similar key."""
  # Keys from a file can have any length and any characters.
  path = re.sub(r'[^\w.]', '?', path[:100])
  if path in renames.RENAMED_KEYS:
    return f'config.{path} is now config.{renames.RENAMED_KEYS[path]}; use that name'
  paths = [known for known, _ in leaves()]
  section, dot, name = path.rpartition('.')
  if first_key := next((p for p in paths if p.startswith(f'{path}.')), None):
    return f'config.{path} is a section; set one of its keys, for example config.{first_key}'
  prefix, siblings = section + dot, [p for p in paths if p.startswith(section + dot)]
  if not siblings:  # The section does not exist: list all sections.
    prefix, siblings = '', paths
  same_name = [p for p in paths if p.rpartition('.')[2] == name]
  close = (
    difflib.get_close_matches(path, siblings, n=1, cutoff=0.9)  # a typo of a key of this section
    or difflib.get_close_matches(path, same_name or paths, n=1, cutoff=0.7)
    or same_name
  )
  hint = f' Did you mean {close[0]}?' if close else ''
  listed = dict.fromkeys(prefix + p.removeprefix(prefix).partition('.')[0] for p in siblings)
  return f'config.{path} is not a key.{hint} Known keys: {", ".join(listed)}'


def describe() -> str:
  """Returns the help text of all keys, by section, in lines of at most 100 characters."""
  return '\n'.join(_describe(Config, ''))


def _describe(section: type, prefix: str) -> Iterator[str]:
  yield textwrap.fill(f'[config{prefix}] {" ".join((section.__doc__ or "").split())}', 100)
  descriptions, subsections = fields.descriptions(section), []
  for field in dataclasses.fields(section):
    path, key = f'{prefix}.{field.name}', fields.parse(field)
    if key.section:
      subsections.append((key.section, path))
      continue
    default = "''" if key.default == '' else key.default
    yield f'  --config{path}={default}'
    description = descriptions[field.name]
    lines = textwrap.fill(description, 94, break_long_words=False, break_on_hyphens=False)
    yield textwrap.indent(lines, ' ' * 6)
  for subsection, path in subsections:
    yield ''
    yield from _describe(subsection, path)
