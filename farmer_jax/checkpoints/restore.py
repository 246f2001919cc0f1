"""Restores checkpoints. The checksum of every array is verified.

A restore executes no code from a checkpoint. TensorStore reads the arrays. All other data are JSON.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jaxtyping import PyTree

from farmer_jax import errors
from farmer_jax.checkpoints import checksums, orbax_internals
from farmer_jax.checkpoints.orbax_internals import CorruptCheckpoint
from farmer_jax.distributed import processes
from farmer_jax.workdir import stores

FOLDER = 'checkpoints'

# The items of a checkpoint. The manifest has the keys `format`, `step`, `leaves` (the result
# of `checksums.of_tree` for the state), `data_iterator` (the checksum of this item), `loss` (the
# validation loss or None), `fidelity` (a Fréchet distance, if it was computed) and `digest` (the
# checksum of the other keys).
STATE, DATA_ITERATOR, MANIFEST = 'state', 'data_iterator', 'manifest'

# Version 0.1 had no manifest. In format 2, transformers had a final norm, all parameters had the
# same learning rate, and the channels of tokens were pixels.
FORMAT = 3

T = TypeVar('T')


def restore_state(
  workdir: epath.Path, state: PyTree, step: int | None = None
) -> tuple[tuple[int, tuple[PyTree, dict]] | None, list[int]]:
  """Restores a checkpoint, by default the newest valid one, in all processes together.

  See `Checkpointer`. Returns (step, (state, iterator state)), or None if there is no checkpoint,
  and the steps of newer, corrupt checkpoints.
  """
  target = jax.tree.map(ocp.tree.to_shape_dtype_struct, state)
  items = {STATE: ocp.args.StandardRestore(target), DATA_ITERATOR: ocp.args.JsonRestore()}

  def read(folder: epath.Path) -> tuple[PyTree, dict]:
    manifest, restored = _on_all_processes(_read, folder, items, target, exact=True)
    sums = checksums.of_tree(restored[STATE])
    _on_all_processes(_verify, manifest, sums, restored[DATA_ITERATOR])
    return restored[STATE], restored[DATA_ITERATOR]

  if step is not None:
    return (step, _restore_step(workdir, step, read)), []
  return _newest_valid(workdir, read)


def restore_params(
  workdir: epath.Path, name: str, shapes: PyTree, step: int | None = None
) -> tuple[PyTree, int]:
  """Restores 'params' or 'ema_params'. `shapes` have the shardings of the parameters.

  Each device reads its own shards, so that neither a device nor the host holds a whole copy. No
  file is changed, because the run may be training at the same time. Without `step`, the newest
  valid checkpoint is restored. Returns the parameters and their step.

  Raises:
    CheckpointError: the checkpoint does not exist, is corrupt, cannot be read, or belongs to
      another model or version of farmer_jax.
  """

  def read(folder: epath.Path) -> PyTree:
    return _read_part(folder, {name: shapes})[name]

  if step is not None:
    return _restore_step(workdir, step, read), step
  found, _ = _newest_valid(workdir, read)
  if found is None:
    raise errors.CheckpointError(f'{workdir} has no checkpoint; train the model first')
  return found[1], found[0]


def read_back(workdir: epath.Path, step: int, state: PyTree) -> bool:
  """Reads and verifies the parameters of a checkpoint that was just saved.

  Returns whether it could be read. An object store may be unreachable for some time.

  Raises:
    CheckpointError: the checkpoint cannot be read, or differs from `state`.
  """
  leaves = checksums.leaves_by_path(jax.tree.map(ocp.tree.to_shape_dtype_struct, state))
  params = {path: leaf for path, leaf in leaves.items() if path.startswith('params/')}
  folder = workdir / FOLDER / str(step)
  try:
    _read_part(folder, traverse_util.unflatten_dict(params, sep='/'))
  except CorruptCheckpoint as error:
    raise errors.CheckpointError(
      f'the first checkpoint of this run, {folder}, cannot be read back ({error}); check the disk,'
      ' or train into another --workdir'
    ) from error
  except errors.UserError as error:
    if not stores.is_store(workdir):
      raise
    logging.warning(f'Checkpoint {step} cannot be read back now ({error}). Training continues.')
    return False
  return True


def _read_part(folder: epath.Path, target: PyTree) -> PyTree:
  """Returns the arrays of `target`, a part of the state, from a checkpoint, and verifies them."""
  restore_args = ocp.checkpoint_utils.construct_restore_args(target)
  item = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
  manifest, restored = _on_all_processes(_read, folder, {STATE: item}, target)
  _on_all_processes(_verify, manifest, checksums.of_tree(restored[STATE]))
  return restored[STATE]


def list_steps(workdir: epath.Path) -> list[int]:
  """Returns the steps of all complete checkpoints, even corrupt ones, in increasing order."""
  return sorted(ocp.utils.checkpoint_steps(workdir / FOLDER))


def check_step(workdir: epath.Path, step: int) -> None:
  """Raises CheckpointError, which names the stored steps, if there is no checkpoint of `step`."""
  steps = processes.gather(list_steps(workdir))[0]
  if step not in steps:
    raise errors.CheckpointError(
      f'{workdir} has no checkpoint of step {step} (it has {", ".join(map(str, steps)) or "none"});'
      ' --config.train.keep_checkpoints and --config.train.keep_every define which steps are stored'
    )


def newest_step(workdir: epath.Path) -> int:
  """Returns the step of the newest complete checkpoint, even a corrupt one, or 0."""
  return max(list_steps(workdir), default=0)


def read_scores(workdir: epath.Path, name: str) -> dict[int, float]:
  """Returns {step: score 'loss' or 'fidelity'} of the valid manifests that have this score."""
  scores = {}
  for step in list_steps(workdir):
    with (
      contextlib.suppress(CorruptCheckpoint, errors.UserError),
      orbax_internals.classify_exceptions(),
    ):
      scores[step] = _read_manifest(workdir / FOLDER / str(step)).get(name)
  # Process 0 decides, so that all processes delete the same checkpoints. JSON keys are strings.
  scores = processes.gather(scores)[0]
  return {int(step): score for step, score in scores.items() if score is not None}


def _newest_valid(
  workdir: epath.Path, read: Callable[[epath.Path], T]
) -> tuple[tuple[int, T] | None, list[int]]:
  """Calls `read(folder)` for checkpoints from the newest to the oldest until one is valid.

  `read` must raise `CorruptCheckpoint` in all processes or in none. See `restore_state`.
  """
  corrupt: dict[int, str] = {}
  while True:
    steps = processes.gather(list_steps(workdir))[0]
    # A training run may have deleted checkpoints while they were being read.
    corrupt = {step: reason for step, reason in corrupt.items() if step in steps}
    remaining = [step for step in steps if step not in corrupt]
    if not remaining:
      break
    newest = remaining[-1]
    try:
      result = read(workdir / FOLDER / str(newest))
    except CorruptCheckpoint as error:
      corrupt[newest] = str(error)
      continue
    for step, reason in corrupt.items() if not jax.process_index() else ():
      logging.warning(f'Checkpoint {step} is corrupt ({reason}); restoring step {newest} instead.')
    return (newest, result), list(corrupt)
  if corrupt:
    reasons = '; '.join(f'step {step}: {reason}' for step, reason in corrupt.items())
    raise errors.CheckpointError(
      f'all checkpoints in {workdir / FOLDER} are corrupt ({reasons}); copy a valid checkpoint into'
      ' this folder, or delete the folder to restart from step 0'
    )
  return None, []


def _restore_step(workdir: epath.Path, step: int, read: Callable[[epath.Path], T]) -> T:
  """Returns `read(folder)` of one checkpoint. Converts every failure to a `CheckpointError`."""
  check_step(workdir, step)
  folder = workdir / FOLDER / str(step)
  try:
    return read(folder)
  except CorruptCheckpoint as error:
    raise errors.CheckpointError(
      f'checkpoint {folder} is corrupt ({error}); replace it with a copy, or choose another step'
    ) from error


def _on_all_processes(action: Callable[..., T], *args: Any, **kwargs: Any) -> T:
  """Calls `action` in every process. If it fails in one process, all processes raise the error."""
  problem: tuple[bool, str] | None = None
  try:
    with orbax_internals.classify_exceptions():
      result = action(*args, **kwargs)
  except (CorruptCheckpoint, errors.UserError) as error:
    problem = isinstance(error, CorruptCheckpoint), str(error)
  problems = [tuple(found) for found in processes.gather(problem) if found]
  if problems:
    is_corruption, reason = min(problems)  # Other errors take precedence over corruption.
    raise CorruptCheckpoint(reason) if is_corruption else errors.CheckpointError(reason)
  return result


def _read(
  folder: epath.Path, items: dict[str, Any], target: PyTree, exact: bool = False
) -> tuple[dict, Any]:
  """Returns the manifest of a checkpoint and the restored items, which are not verified yet.

  The checkpoint must contain the arrays of `target` and, with `exact`, no other arrays.
  """
  manifest = _read_manifest(folder)
  saved = {path: described[:2] for path, described in manifest['leaves'].items()}
  leaves = checksums.leaves_by_path(target)
  expected = {path: checksums.shape_and_dtype(leaf) for path, leaf in leaves.items()}
  for path in expected | saved if exact else expected:
    if saved.get(path) != expected.get(path):
      raise errors.CheckpointError(
        f'checkpoint {folder} belongs to another model: {path} is {saved.get(path)} in the'
        f' checkpoint and {expected.get(path)} in this model; use the configuration of the run'
      )
  return manifest, _restore_items(folder, items)


def _read_manifest(folder: epath.Path) -> dict:
  """Returns the verified manifest. Raises an error if another version wrote the checkpoint."""
  if not any(folder.iterdir()):
    raise CorruptCheckpoint('it is empty')
  if MANIFEST not in orbax_internals.item_names(folder) and not (folder / MANIFEST).exists():
    raise errors.CheckpointError(
      f'checkpoint {folder} was written by farmer_jax 0.1, and this version cannot continue or'
      ' sample from it; use version 0.1 for this run, or choose another --workdir'
    )
  manifest = _restore_items(folder, {MANIFEST: ocp.args.JsonRestore()})[MANIFEST]
  digest = manifest.pop('digest', None)
  if digest != checksums.of_json(manifest):
    raise CorruptCheckpoint('its manifest changed on disk')
  if manifest.get('step', int(folder.name)) != int(folder.name):
    raise CorruptCheckpoint(f'it is a checkpoint of step {manifest["step"]}')
  if manifest['format'] != FORMAT:
    raise errors.CheckpointError(
      f'checkpoint {folder} has format {manifest["format"]}, and this version of farmer_jax reads'
      f' format {FORMAT}; use the version that wrote the checkpoint, or choose another --workdir'
    )
  return manifest


def _restore_items(folder: epath.Path, items: dict[str, Any]) -> Any:
  """Restores items of a checkpoint in this process, without barriers.

  At a barrier, the other processes would wait for a process that has failed.
  """
  for name in items:
    if not (folder / name).exists():
      raise CorruptCheckpoint(f'it has no {name}')
  process = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=process, active_processes={process}, barrier_sync_key_prefix=f'process{process}'
  )
  with ocp.Checkpointer(
    ocp.CompositeCheckpointHandler(), multiprocessing_options=options
  ) as reader:
    return reader.restore(folder, args=ocp.args.Composite(**items))


def _verify(manifest: dict, sums: dict[str, list], iterator_state: dict | None = None) -> None:
  """Raises `CorruptCheckpoint` if restored values differ from the saved ones."""
  changed = [path for path, found in sums.items() if manifest['leaves'][path] != found]
  if changed:
    more = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    raise CorruptCheckpoint(f'{changed[0]}{more} changed on disk')
  if iterator_state is not None and manifest[DATA_ITERATOR] != checksums.of_json(iterator_state):
    raise CorruptCheckpoint('the state of the data iterator changed on disk')
