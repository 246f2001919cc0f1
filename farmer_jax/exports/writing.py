"""Writes exports, one file of weights at a time."""

import math
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from safetensors import numpy as safetensors

from farmer_jax.errors import WorkdirError
from farmer_jax.exports import tensors
from farmer_jax.workdir import hub, layout, stores

_Tensor = tuple[str, Any, tensors.Index]

# Files of an older export that the new one may not have.
_OWN_FILES = re.compile(
  r'model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|samples\.png'
)


def check_folder(path: epath.PathLike) -> epath.Path:
  """Returns the absolute path of a folder for an export.

  Raises:
    WorkdirError: the folder is in an object store, or has files and is not an export.
  """
  if hub.is_url(path) or stores.is_store(path):
    raise WorkdirError(
      f'exports are written to local folders, not to {path}; set --config.export.path=FOLDER'
    )
  folder = layout.absolute(path)
  layout.check_no_pattern(folder, '--config.export.path')
  if folder.exists() and not (
    folder.is_dir() and (not any(folder.iterdir()) or layout.read_export(folder))
  ):
    raise WorkdirError(
      f'{folder} exists and is not an export; choose another --config.export.path, or delete it'
    )
  return folder


def write(
  folder: epath.Path,
  params: PyTree,
  record: Mapping[str, Any],
  files: Mapping[str, bytes],
  max_bytes: float,
) -> None:
  """Writes an export. Replaces the files of an older export.

  Without config.json, a folder is not an export. This file arrives last. The host holds the weights
  of one file at a time.

  Args:
    folder: the result of `check_folder`.
    params: the parameters of evaluation.
    record: the content of config.json, see `farmer_jax.exports`.
    files: the other files by name.
    max_bytes: the largest size of the tensors of one file, unless a single tensor is larger.
  """
  folder = check_folder(folder)
  partial = folder.with_name(f'.{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)  # A killed job can have left it.
  try:
    partial.mkdir(parents=True)
    layout.write_json(partial / layout.CONFIG_FILE, dict(record))
    for name, content in files.items():
      (partial / name).write_bytes(content)
    _write_weights(partial, params, record, max_bytes)
    _move(partial, folder)
  except OSError as error:
    raise WorkdirError(
      f'cannot write the export {folder} ({stores.describe(error)}); choose another'
      ' --config.export.path'
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _move(partial: epath.Path, folder: epath.Path) -> None:
  """Moves a complete export into its place. Keeps files that are not part of an export."""
  if not folder.exists():
    partial.replace(folder)
    return
  (folder / layout.CONFIG_FILE).unlink(missing_ok=True)
  for file in folder.iterdir():
    if _OWN_FILES.fullmatch(file.name):
      file.unlink()
  names = [file.name for file in partial.iterdir() if file.name != layout.CONFIG_FILE]
  for name in (*names, layout.CONFIG_FILE):
    (partial / name).replace(folder / name)


def _write_weights(
  folder: epath.Path, params: PyTree, record: Mapping[str, Any], max_bytes: float
) -> None:
  """Writes the tensors into one or more files, with an index of several files."""
  groups: list[list[_Tensor]] = []
  total, size = 0, np.inf
  for name, leaf, index in tensors.sliced(params):
    num_bytes = math.prod(leaf.shape[len(index) :]) * leaf.dtype.itemsize
    if size + num_bytes > max_bytes:
      groups.append([])
      size = 0
    groups[-1].append((name, leaf, index))
    size, total = size + num_bytes, total + num_bytes
  names = ('farmer_jax_version', 'step', 'parameters')
  metadata = {'format': 'flax'} | {name: str(record[name]) for name in names}
  stem, _, suffix = tensors.WEIGHTS_FILE.partition('.')
  weight_map: dict[str, str] = {}
  for number, group in enumerate(groups, 1):
    file = f'{stem}-{number:05d}-of-{len(groups):05d}.{suffix}'
    file = tensors.WEIGHTS_FILE if len(groups) == 1 else file
    safetensors.save_file(_host_arrays(group), str(folder / file), metadata)
    # The library gives no permissions to other users.
    shutil.copymode(folder / layout.CONFIG_FILE, folder / file)
    weight_map |= {name: file for name, _, _ in group}
  if len(groups) > 1:
    index_file = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    layout.write_json(folder / tensors.INDEX_FILE, index_file)


def _host_arrays(group: list[_Tensor]) -> dict[str, np.ndarray]:
  """Copies tensors to the host. Arrays of one CPU device are on the host already."""
  arrays = {}
  for name, leaf, index in group:
    devices = leaf.sharding.device_set
    on_host = len(devices) == 1 and next(iter(devices)).platform == 'cpu'
    # The slice is a new array, so that JAX does not keep the copy on the host.
    tensor = np.asarray(leaf)[index] if on_host else jax.device_get(leaf[index])
    arrays[name] = np.ascontiguousarray(tensor)
  return arrays
