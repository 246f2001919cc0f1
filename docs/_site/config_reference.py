"""The reference of configuration keys and of flags, from their declarations."""

import dataclasses
import functools
from collections.abc import Iterator

from absl import flags

from farmer_jax import config as config_lib
from farmer_jax import main
from farmer_jax.config import fields

_KEYS_INTRO = """# Configuration reference

All keys of the configuration. A configuration file sets them, for example `c.train.steps = 2000`,
and the command line overrides them: `--config.train.steps=2000`. This command prints the list:
`python -m farmer_jax.main --config_help`.

A run that exists accepts new values of keys marked ↻. All other keys determine what the run learns.
"""
_FLAGS_INTRO = """# Command line

    python -m farmer_jax.main --config=FILE [--job=JOB] [--workdir=FOLDER] [--config.KEY=VALUE …]

[All keys](config.md) of the configuration can follow the configuration file. Exit codes:
[Faults](../guides/faults.md).

| flag | meaning |
| --- | --- |
"""


@functools.cache
def anchors() -> frozenset[str]:
  """Returns the anchors of the reference: all keys and sections, by dotted path."""
  return frozenset(path for path, _, _ in _sections()) | {p for p, _ in config_lib.leaves()}


def keys_page() -> str:
  """Returns the page of all keys, as Markdown with one table per section."""
  return _KEYS_INTRO + ''.join(_section(*section) for section in _sections())


def flags_page() -> str:
  """Returns the page of the flags of `farmer_jax.main`, as Markdown."""
  ours = flags.FLAGS.flags_by_module_dict()[main.__name__]
  rows = [f'| `--{flag.name}` | {_escape(flag.help)} |' for flag in ours]
  return _FLAGS_INTRO + '\n'.join(rows) + '\n'


def _sections(
  section: type = config_lib.Config, path: str = '', changeable: bool = False
) -> Iterator[tuple[str, type, bool]]:
  """Yields path, dataclass and changeability of all sections, each before its subsections."""
  yield path, section, changeable
  for field in dataclasses.fields(section):
    key = fields.parse(field)
    if key.section:
      inner = f'{path}.{field.name}'.lstrip('.')
      yield from _sections(key.section, inner, changeable or key.changeable)


def _section(path: str, section: type, changeable: bool) -> str:
  title = f'## `{path}` {{#{path}}}' if path else '## Keys without a section'
  lines = ['', title, '', ' '.join((section.__doc__ or '').split()), '']
  lines += ['| key | values | default | meaning |', '| --- | --- | --- | --- |']
  descriptions = fields.descriptions(section)
  for field in dataclasses.fields(section):
    key = fields.parse(field)
    if not key.section:
      full = f'{path}.{field.name}'.lstrip('.')
      mark = ' ↻' if changeable or key.changeable else ''
      default = "''" if key.default == '' else key.default
      meaning = _escape(descriptions[field.name])
      name = f'`{field.name}`{{#{full}}}{mark}'
      lines.append(f'| {name} | {_values(key)} | `{default}` | {meaning} |')
  return '\n'.join(lines) + '\n'


def _values(key: fields.Key) -> str:
  """Returns the allowed values of a key, for example `float, 0 to 1`."""
  if key.choices:
    return ', '.join(f'`{choice}`' for choice in key.choices)
  text = ' or '.join(t.__name__ for t in key.types).replace('NoneType', 'None')
  if not {int, float} & set(key.types):
    return text
  parts = [
    f'{sign} {bound:g}'
    for sign, bound in zip(('≥', '>', '≤', '<'), key.range, strict=True)
    if abs(bound) != float('inf')
  ]
  return ', '.join([text, *parts])


def _escape(text: str) -> str:
  """Returns text for a cell of a table, in which no character is markup."""
  for character in '\\|*_[':
    text = text.replace(character, f'\\{character}')
  return text.replace('<', '&lt;')
