"""The tensors of an export: one per block and layer, where the model has stacked arrays."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

WEIGHTS_FILE = 'model.safetensors'
INDEX_FILE = f'{WEIGHTS_FILE}.index.json'

Index = tuple[int, ...]


def template(path: Any) -> tuple[str, int]:
  """Returns the name of the tensors of a parameter, and the number of stacked axes.

  The stacked axes are the first axes of the array: blocks and layers. For each of them, the name
  has a `{}`. `path` is a key path of JAX.
  """
  name = jax.tree_util.keystr(path, simple=True, separator='.')
  name = name.replace('.transformer.stack.', '.layer_{}.').replace('.stack.', '.block_{}.')
  return name, name.count('{}')


def stacked_indices(shape: Sequence[int]) -> Iterator[Index]:
  """Yields the indices into stacked axes with these sizes. () has one index, ()."""
  return itertools.product(*map(range, shape))


def sliced(params: PyTree) -> Iterator[tuple[str, Any, Index]]:
  """Yields (name of the tensor, array, index into its stacked axes) for all tensors."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name, stacked = template(path)
    for index in stacked_indices(leaf.shape[:stacked]):
      yield name.format(*index), leaf, index
