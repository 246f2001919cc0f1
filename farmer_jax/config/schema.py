"""Between ConfigDicts, which command lines change, and the frozen dataclasses of `sections`."""

import dataclasses
import difflib
import re
import reprlib
import types
import typing

import ml_collections

from farmer_jax.config.sections import Config
from farmer_jax.errors import ConfigError


def defaults():
  """A ConfigDict of all keys at their defaults, for config files to change."""
  return to_config_dict(Config())


def to_config_dict(config):
  """The ConfigDict of a dataclass; a key that may be None stays overridable."""
  result = ml_collections.ConfigDict()
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      result[field.name] = to_config_dict(value)
    elif type(None) in typing.get_args(field.type):
      (concrete,) = (t for t in typing.get_args(field.type) if t is not type(None))
      result[field.name] = ml_collections.config_dict.placeholder(concrete)
      result[field.name] = value
    else:
      result[field.name] = value
  return result


def to_dict(config):
  """Plain nested dict, as written to `config.json`."""
  return dataclasses.asdict(config)


def from_config_dict(values, cls=Config, prefix=''):
  """Builds the dataclass `cls` from a ConfigDict or dict; unknown keys and wrong types are
  errors."""
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      raise ConfigError(unknown_key(f'{prefix}{name}'))
  built = {}
  for name, value in values.items():
    field, path = fields[name], prefix + name
    if dataclasses.is_dataclass(field.type):
      if not hasattr(value, 'items'):
        raise ConfigError(f'config.{path} is a section, not a value; set one of its keys')
      built[name] = from_config_dict(value, field.type, path + '.')
    else:
      built[name] = _checked(path, value, field)
  return cls(**built)


def _checked(path, value, field):
  """`value` if it has the type and is among the choices of `field`; an int may stand for a
  float."""
  union = isinstance(field.type, types.UnionType)
  allowed = typing.get_args(field.type) if union else (field.type,)
  if float in allowed and isinstance(value, int) and not isinstance(value, bool):
    value = float(max(-(2**1000), min(value, 2**1000)))  # which is out of any range
  if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
    names = ' or '.join(t.__name__ for t in allowed).replace('NoneType', 'None')
    raise ConfigError(f'config.{path} must be {names}, not {reprlib.repr(value)}')
  choices = field.metadata['choices']
  if choices and value not in choices:
    known = ', '.join(map(str, choices))
    raise ConfigError(f'config.{path} must be one of {known}, not {reprlib.repr(value)}')
  return value


def leaves(cls=Config, prefix=''):
  """Yields (dotted path, field) for every key."""
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      yield from leaves(field.type, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, field


def get(config, path):
  """The value at a dotted path."""
  for name in path.split('.'):
    config = getattr(config, name)
  return config


def unknown_key(path):
  """The message for a key that does not exist: the likely meant one, and the known ones beside
  it."""
  path = re.sub(r'[^\w.]', '?', path[:100])  # It may be anything that a file had in it.
  paths = [known for known, _ in leaves()]
  section_path, _, name = path.rpartition('.')
  prefix = f'{section_path}.' if section_path else ''
  siblings = [prefix + p[len(prefix) :].partition('.')[0] for p in paths if p.startswith(prefix)]
  if not siblings:  # The section does not exist either.
    siblings = [p.partition('.')[0] for p in paths]
  siblings = list(dict.fromkeys(siblings))
  close = difflib.get_close_matches(path, paths, n=1, cutoff=0.7) or [
    p for p in paths if p.rpartition('.')[2] == name
  ]
  hint = f' Did you mean {close[0]}?' if close else ''
  return f'config.{path} is not a setting.{hint} Known there: {", ".join(siblings)}'


def describe():
  """All keys with their defaults and meanings, one a line."""
  lines = []
  for path, field in leaves():
    lines.append(f'--config.{path}={field.default}\n    {field.metadata["doc"]}')
  return '\n'.join(lines)
