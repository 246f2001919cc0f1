"""Converts pytorch-fid's file of Inception weights to the npz file that `inception.load` reads.

    python -m farmer_jax.evaluation.convert_inception \
      pt_inception-2015-12-05-6726825d.pth inception.npz

The file is in the release fid_weights of github.com/mseitzer/pytorch-fid. Only the conversion needs
PyTorch (`pip install torch`).
"""

import hashlib
import sys
from typing import Any

import numpy as np
from absl import app
from etils import epath

from farmer_jax import errors, terminal
from farmer_jax.evaluation import inception
from farmer_jax.workdir import layout

PYTORCH_FILE = 'pt_inception-2015-12-05-6726825d.pth'

# Flax name of a leaf -> PyTorch name.
_LEAF_NAMES = dict(kernel='weight', scale='weight', mean='running_mean', var='running_var')
# Number of axes -> axes of a PyTorch array, [out, in, height, width], in the order of Flax.
_AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def convert(source: epath.Path, target: epath.Path) -> None:
  """Converts the PyTorch file `source` and writes the npz file `target`.

  Raises:
    DataError: the file cannot be read without executing code, or it contains other tensors.
    ConfigError: PyTorch is not installed.
  """
  tensors = _read(source)
  shapes = inception.variable_shapes()
  names = {path: _pytorch_name(path) for path in shapes}
  expected = {'fc.bias': (1008,)} | {
    names[path]: tuple(shape[axis] for axis in np.argsort(_AXES[len(shape)]))
    for path, shape in shapes.items()
  }
  found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  problems = {
    'missing': expected.keys() - found.keys(),
    'unexpected': found.keys() - expected.keys(),
    'of another shape': {n for n in expected.keys() & found.keys() if expected[n] != found[n]},
  }
  listed = [f'{problem}: {_first_names(n)}' for problem, n in problems.items() if n]
  if listed:
    raise errors.DataError(f'{source} is not {PYTORCH_FILE}; tensors {", ".join(listed)}')
  arrays = {
    path: tensors[names[path]].float().numpy().transpose(_AXES[len(shape)])
    for path, shape in shapes.items()
  }
  arrays[inception.CHECKSUM] = np.array(inception.checksum(arrays))
  layout.write_npz(target, arrays)


def convert_once(source: epath.Path, folder: epath.Path) -> epath.Path:
  """Returns the npz file in `folder` that belongs to a PyTorch file. Creates it if necessary."""
  try:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
  except OSError as error:
    raise errors.DataError(
      f'cannot read the Inception weights {source} ({error.strerror or error}); set'
      f' --config.fidelity.weights to {PYTORCH_FILE} or to an npz file converted from it'
    ) from error
  target = folder / f'inception-{digest[:8]}.npz'
  if not target.exists():
    convert(source, target)
  return target


def _read(path: epath.Path) -> dict[str, Any]:
  """Returns the tensors in a PyTorch file. `weights_only` refuses other pickled objects."""
  try:
    import torch
  except ImportError as error:
    raise errors.ConfigError(
      f'reading {path} needs PyTorch, which is not installed; on a machine with PyTorch, run'
      f' `python -m farmer_jax.evaluation.convert_inception {path.name} inception.npz`, and set'
      ' --config.fidelity.weights=inception.npz'
    ) from error
  try:
    with path.open('rb') as file:
      tensors = torch.load(file, map_location='cpu', weights_only=True)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
      raise TypeError('other objects')
  except MemoryError:
    raise
  except Exception as error:  # Corrupt files cause exceptions of many types.
    raise errors.DataError(
      f'{path} is not a PyTorch file of named tensors ({type(error).__name__}); get {PYTORCH_FILE}'
      ' from the release fid_weights of github.com/mseitzer/pytorch-fid'
    ) from error
  # PyTorch's count of training batches is not needed.
  return {str(n): t for n, t in tensors.items() if not str(n).endswith('.num_batches_tracked')}


def _pytorch_name(path: str) -> str:
  """Returns the PyTorch name of a variable such as params/Mixed_5b/branch1x1/bn/scale."""
  _, *modules, leaf = path.split('/')
  return '.'.join([*modules, _LEAF_NAMES.get(leaf, leaf)])


def _first_names(names: set[str]) -> str:
  """Lists the first three names, shortened, and the number of other names."""
  shown = [repr(name[:40]) for name in sorted(names)[:3]]
  return ' and '.join(shown + ([f'{len(names) - 3} more'] if len(names) > 3 else []))


def main(argv: list[str]) -> None:
  """Converts the file argv[1] to the file argv[2]."""
  if len(argv) != 3:
    raise app.UsageError(f'expected two arguments: {PYTORCH_FILE} and inception.npz')
  source, target = map(layout.absolute, argv[1:])
  try:
    convert(source, target)
  except errors.UserError as error:
    sys.exit(f'error: {error}')
  terminal.print_result(f'Wrote {target}')


if __name__ == '__main__':
  app.run(main)
