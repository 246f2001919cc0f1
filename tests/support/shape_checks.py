"""Checks the jaxtyping annotations of functions at run time, while JAX traces them."""

from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

# An int is accepted where an annotation says float.
_CHECK = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_PACKAGES = ('farmer_jax.nn', 'farmer_jax.ops', 'farmer_jax.losses', 'farmer_jax.noise')


def install() -> None:
  """Adds checks of arguments and results to the functions of `_PACKAGES` when they are imported."""
  jaxtyping.install_import_hook(_PACKAGES, f'{__name__}.check_function')


def check_function(function: Callable[..., Any]) -> Callable[..., Any]:
  """Applies `beartype` to all functions except constructors.

  JAX constructs registered dataclasses with arbitrary objects in place of arrays.
  """
  return function if function.__name__ == '__init__' else _CHECK(function)
