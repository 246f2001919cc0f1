"""Declarations of configuration keys.

A key is a field of a frozen dataclass. The type of the field defines the allowed values. The string
below the field is the description, with the unit, that `--config_help` prints. Numbers must be
above 0 unless their type has a `Range`. `Literal` lists the allowed values.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import typing
from typing import Annotated, Any, Literal, NamedTuple, TypeVar


class Range(NamedTuple):
  """The range of allowed numbers."""

  at_least: float = -math.inf
  above: float = -math.inf
  at_most: float = math.inf
  below: float = math.inf


_CHANGEABLE = 'changeable'
_T = TypeVar('_T')

# An existing run accepts a new value of a changeable key, or of any key in a changeable section.
# Keys that affect the parameters or the metrics of training must not be changeable.
Changeable = Annotated[_T, _CHANGEABLE]

Dtype = Literal['float32', 'bfloat16', 'float64']
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
BelowOne = Annotated[float, Range(at_least=0, below=1)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
NonNegativeOrNone = Annotated[float | None, Range(at_least=0)]


class Key(NamedTuple):
  """The declaration of a key or of a section."""

  default: Any
  types: tuple[type, ...]
  choices: tuple
  range: Range
  changeable: bool

  @property
  def section(self) -> type | None:
    """The dataclass of a section, or None for a key."""
    return self.types[0] if dataclasses.is_dataclass(self.types[0]) else None


@functools.cache
def parse(field: dataclasses.Field) -> Key:
  """Reads the declaration of a dataclass field."""
  marks = getattr(field.type, '__metadata__', ())
  declared = typing.get_args(field.type)[0] if marks else field.type
  args = typing.get_args(declared)
  choices = args if typing.get_origin(declared) is Literal else ()
  types = tuple(dict.fromkeys(map(type, choices))) or args or (declared,)
  (allowed,) = [mark for mark in marks if isinstance(mark, Range)] or [Range(above=0)]
  return Key(field.default, types, choices, allowed, _CHANGEABLE in marks)


def descriptions(section: type) -> dict[str, str]:
  """Returns the descriptions of the keys of a section, by key name."""
  (tree,) = ast.parse(inspect.getsource(section)).body
  return {
    ast.unparse(key.target): inspect.cleandoc(ast.literal_eval(text.value)).replace('\n', ' ')
    for key, text in itertools.pairwise(typing.cast(ast.ClassDef, tree).body)
    if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr)
  }
