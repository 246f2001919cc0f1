"""Reads exports. Each device reads its own shards of the parameters."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from farmer_jax import config as config_lib
from farmer_jax.errors import CheckpointError, reason
from farmer_jax.exports import tensors
from farmer_jax.workdir import layout, stores


def read_config(path: epath.PathLike) -> config_lib.Config:
  """Returns the configuration of an export: a folder, a file in it, or hf://USER/NAME.

  Raises:
    WorkdirError: the folder has no valid config.json.
    ConfigError: the configuration has an unknown key or an invalid value.
  """
  return config_lib.from_config_dict(layout.read_config(path))


def restore_params(path: epath.PathLike, target: PyTree) -> PyTree:
  """Reads parameters of an export: a folder, a file in it, or hf://USER/NAME.

  `target` is a tree of arrays or of `jax.ShapeDtypeStruct`. The results have its shapes, its dtypes
  and its shardings, if it has shardings. It can be a part of the exported parameters, such as
  `{'flow': …}`. Neither a device nor the host holds a whole copy of sharded parameters.

  Raises:
    CheckpointError: a file is missing or damaged, or the parameters have other names or shapes.
  """
  folder = layout.absolute(path)
  if stores.is_store(folder):
    raise CheckpointError(f'exports are read from local folders; copy {folder} to a local folder')
  try:
    with contextlib.ExitStack() as stack:
      handles = _open(folder, stack)
      return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _restore_leaf(handles, folder, path, leaf), target
      )
  except (OSError, SafetensorError) as error:
    raise CheckpointError(
      f'cannot read the export {folder} ({reason(error)}); copy it again'
    ) from error


def _open(folder: epath.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """Returns the open file of each tensor by the name of the tensor."""
  index, names = folder / tensors.INDEX_FILE, {tensors.WEIGHTS_FILE}
  if index.exists():
    weight_map = layout.read_json(index, _is_index)['weight_map']
    names = set(weight_map.values())
  handles: dict[str, Any] = {}
  for name in sorted(names):
    # Pages of a mapped file would count as memory of the process, in addition to the parameters.
    file = safe_open(str(folder / name), framework='numpy', backend='pread')
    opened = stack.enter_context(file)
    handles |= dict.fromkeys(opened.keys(), opened)
  if index.exists() and (missing := sorted(set(weight_map) - set(handles))):
    raise CheckpointError(f'the files of the export {folder} lack {missing[0]}; copy it again')
  return handles


def _is_index(value: Any) -> bool:
  """Returns whether a value is an index of files, all of them in the folder of the index."""
  names = value.get('weight_map') if isinstance(value, dict) else None
  return isinstance(names, dict) and all(
    isinstance(name, str) and name == epath.Path(name).name for name in names.values()
  )


def _restore_leaf(handles: dict[str, Any], folder: epath.Path, path: Any, leaf: Any) -> jax.Array:
  name, stacked = tensors.template(path)
  shape = tuple(leaf.shape)
  _check_names(handles, folder, name, shape[:stacked])
  read = _reader(handles, folder, name, stacked, leaf)
  if getattr(leaf, 'sharding', None) is None:
    return jax.device_put(read(tuple(slice(size) for size in shape)))
  return jax.make_array_from_callback(shape, leaf.sharding, read)


def _check_names(
  handles: dict[str, Any], folder: epath.Path, name: str, sizes: tuple[int, ...]
) -> None:
  """Raises CheckpointError unless the export has exactly these numbers of blocks and layers."""
  first = (0,) * len(sizes)
  outside = [first[:axis] + (size,) + first[axis + 1 :] for axis, size in enumerate(sizes)]
  for index in tensors.stacked_indices(sizes):
    if name.format(*index) not in handles:
      raise _other_model(folder, f'it has no {name.format(*index)}')
  for index in outside:
    if name.format(*index) in handles:
      raise _other_model(folder, f'it also has {name.format(*index)}')


def _reader(
  handles: dict[str, Any], folder: epath.Path, name: str, stacked: int, leaf: Any
) -> Callable[[Any], np.ndarray]:
  """Returns a function that reads a slice of a stacked array."""

  def read(index: tuple[slice, ...]) -> np.ndarray:
    ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
    result = np.empty([len(part) for part in ranges], leaf.dtype)
    for place in tensors.stacked_indices(result.shape[:stacked]):
      tensor = name.format(*(part[i] for part, i in zip(ranges, place, strict=False)))
      source = handles[tensor].get_slice(tensor)
      if tuple(source.get_shape()) != leaf.shape[stacked:]:
        shapes = f'{source.get_shape()}, not {list(leaf.shape[stacked:])}'
        raise _other_model(folder, f'{tensor} has the shape {shapes}')
      result[place] = source[tuple(slice(p.start, p.stop) for p in ranges[stacked:])]
    return result

  return read


def _other_model(folder: epath.Path, difference: str) -> CheckpointError:
  return CheckpointError(
    f'the export {folder} belongs to another model: {difference}; use its configuration'
  )
