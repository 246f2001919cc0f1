"""Helpers for tests of the configuration."""

import ast
from typing import Any

from farmer_jax import config

LEAVES = dict(config.leaves())
NUMBERS = [p for p, key in LEAVES.items() if {int, float} & {*key.types} and not key.choices]


def set_path(tree: Any, path: str, value: Any) -> None:
  """Sets the value at a dotted path of a nested dict or ConfigDict."""
  *sections, name = path.split('.')
  for section in sections:
    if section not in tree:
      tree[section] = {}
    tree = tree[section]
  tree[name] = value


def nested(values: dict[str, Any], base: config.Config | None = None) -> dict[str, Any]:
  """Converts {dotted path: value} to a nested dict. Other values come from `base`, if given."""
  tree = config.to_dict(base) if base else {}
  for path, value in values.items():
    set_path(tree, path, value)
  return tree


def parse(text: str) -> dict[str, Any]:
  """Converts 'data.path=x data.channels=3' to a nested dict."""
  pairs = (word.partition('=')[::2] for word in text.split())
  return nested({path: _literal(value) for path, value in pairs})


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text
