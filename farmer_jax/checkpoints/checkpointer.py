"""Saves checkpoints during training, and prepares WORKDIR/checkpoints when a run resumes."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as policies

from farmer_jax import config, errors
from farmer_jax.checkpoints import checksums, orbax_internals, restore
from farmer_jax.distributed import processes

_QUARANTINE = 'checkpoints_quarantine'

# Timeout, in seconds, for processes that wait for each other during a save.
_TIMEOUT = 1200

orbax_internals.hide_orbax_errors()
orbax_internals.support_s3()


class Checkpointer:
  """Saves and restores the checkpoints of a training run, WORKDIR/checkpoints/<step>/.

  Saving is asynchronous. All processes must make the same calls.
  """

  def __init__(self, workdir: epath.Path, train: config.Train):
    self._workdir = workdir
    self._train = train
    self._scores: dict[int, float] = {}  # {step: `train.best_metric`}
    self._manager: ocp.CheckpointManager | None = None
    self._pending_step: int | None = None  # the step of an unfinished asynchronous save
    self._last_failure: str | None = None  # why the last save failed
    self._has_read = False  # whether a checkpoint of this run could be read

  def restore_latest(self, state: PyTree, iterator: grain.DatasetIterator) -> tuple[PyTree, int]:
    """Restores the newest valid checkpoint into arrays like `state` and into `iterator`.

    Moves newer corrupt checkpoints to WORKDIR/checkpoints_quarantine/ and deletes incomplete ones.
    Returns the restored state and its step, or `state` and 0 if there is no checkpoint.

    Raises:
      CheckpointError: all checkpoints are corrupt, or a checkpoint cannot be read or moved, or
        belongs to another model or version of farmer_jax.
    """
    self.wait()
    self._close_manager()  # A manager remembers checkpoints that are now quarantined.
    found, corrupt = restore.restore_state(self._workdir, state)
    processes.on_process_zero(lambda: _quarantine(self._workdir, corrupt))
    processes.on_process_zero(lambda: _remove_incomplete(self._workdir))
    if self._train.keep_best:
      self._scores = restore.read_scores(self._workdir, self._train.best_metric)
    if found is None:
      return state, 0
    self._has_read = True
    step, (state, iterator_state) = found
    iterator.set_state(iterator_state)
    return state, step

  def restore_other(
    self, workdir: epath.Path, step: int, state: PyTree, iterator: grain.DatasetIterator
  ) -> tuple[PyTree, int]:
    """Restores a checkpoint of another run, like `restore_latest`, and changes no file."""
    found, _ = restore.restore_state(workdir, state, step)
    assert found is not None
    step, (state, iterator_state) = found
    iterator.set_state(iterator_state)
    return state, step

  def save(
    self,
    step: int,
    state: PyTree,
    iterator: grain.DatasetIterator,
    loss: float | None = None,
    fidelity: float | None = None,
  ) -> None:
    """Starts to save `state` and the state of `iterator`.

    If finite, the validation `loss` and `fidelity`, a Fréchet distance, are saved, too.

    Logs a failure of the previous save or of this save. Older checkpoints are not affected. With
    several processes, a failure at the start of this save is raised.

    The first checkpoint of a run is read back before `save` returns.

    Raises:
      CheckpointError: the first checkpoint cannot be read back.
    """
    self.wait()
    iterator_state = iterator.get_state()
    scores = {'loss': loss, 'fidelity': fidelity}
    finite = {n: s for n, s in scores.items() if s is not None and math.isfinite(s)}
    manifest = {
      'format': restore.FORMAT,
      'step': step,
      'leaves': checksums.of_tree(state),
      restore.DATA_ITERATOR: checksums.of_json(iterator_state),
      'loss': None,
      **finite,
    }
    manifest['digest'] = checksums.of_json(manifest)
    items = {
      restore.STATE: ocp.args.StandardSave(state),
      restore.DATA_ITERATOR: ocp.args.JsonSave(iterator_state),
      restore.MANIFEST: ocp.args.JsonSave(manifest),
    }
    if self._train.best_metric in finite:
      self._scores[step] = finite[self._train.best_metric]
    self._pending_step, self._last_failure = step, None
    try:
      self._open_manager().save(step, args=ocp.args.Composite(**items), force=True)
    except Exception as error:
      # The other processes wait inside the save. Only the exit of this process ends their wait.
      if jax.process_count() > 1:
        raise
      self._abandon(step, orbax_internals.describe(error))
    if not self._has_read:
      self.wait()
      if not self._last_failure:
        self._has_read = restore.read_back(self._workdir, step, state)

  def wait(self) -> None:
    """Waits until the last save has succeeded or failed."""
    if self._pending_step is None:
      return
    failure = ''
    try:
      self._open_manager().wait_until_finished()
    except Exception as error:
      failure = orbax_internals.describe(error)
    if failures := [found for found in processes.gather(failure) if found]:
      self._abandon(self._pending_step, failures[0])
    self._pending_step = None

  def close(self) -> None:
    """Waits until the last save has ended. Raises CheckpointError if it failed."""
    self.wait()
    self._close_manager()
    if self._last_failure:
      raise errors.CheckpointError(
        f'{self._last_failure}; check the disk of {self._workdir} and run the same command again'
      )

  def _abandon(self, step: int, reason: str) -> None:
    """Reports a failed save, and discards the manager, which cannot be used again."""
    self._pending_step = None
    self._scores.pop(step, None)
    with contextlib.suppress(Exception):  # The manager raises the reported failure again.
      self._close_manager()
    try:
      steps = restore.list_steps(self._workdir)
      newest = f'the newest checkpoint is {steps[-1]}' if steps else 'there is no checkpoint yet'
    except OSError:
      newest = 'the checkpoints cannot be listed either'
    self._last_failure = f'saving checkpoint {step} failed ({reason}); {newest}'
    if not jax.process_index():
      logging.warning(f'{self._last_failure}. Training continues.')
    processes.on_process_zero(lambda: _remove_incomplete(self._workdir))

  def _open_manager(self) -> ocp.CheckpointManager:
    if self._manager is None:
      # A thread of a failed save may have written files after `_abandon` deleted them.
      processes.on_process_zero(lambda: _remove_incomplete(self._workdir))
      kept: list[policies.PreservationPolicy] = [
        policies.LatestN(self._train.keep_checkpoints),
        _LowestScores(self._train.keep_best, self._scores),
      ]
      if self._train.keep_every:
        kept.append(policies.EveryNSteps(self._train.keep_every))
      options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        # Orbax must not read the metadata of old checkpoints, which may be corrupt.
        lightweight_initialize=True,
        async_options=ocp.AsyncOptions(
          timeout_secs=_TIMEOUT, barrier_sync_fn=orbax_internals.make_barrier()
        ),
      )
      self._manager = ocp.CheckpointManager(self._workdir / restore.FOLDER, options=options)
    return self._manager

  def _close_manager(self) -> None:
    manager, self._manager = self._manager, None
    if manager is not None:
      manager.close()


@dataclasses.dataclass
class _LowestScores(policies.PreservationPolicy):
  """Keeps the checkpoints with the `count` lowest scores, {step: score}."""

  count: int
  scores: dict[int, float]

  def should_preserve(
    self, checkpoints: Sequence[policies.PolicyCheckpointInfo], **context: object
  ) -> list[bool]:
    steps = [c.step for c in checkpoints if c.step in self.scores]
    best = sorted(steps, key=lambda step: (self.scores[step], -step))[: self.count]
    return [c.step in best for c in checkpoints]


def _quarantine(workdir: epath.Path, steps: list[int]) -> None:
  """Moves corrupt checkpoints to WORKDIR/checkpoints_quarantine/<step>, <step>.1, <step>.2, …"""
  for step in steps:
    source, target = workdir / restore.FOLDER / str(step), workdir / _QUARANTINE / str(step)
    number = 1
    while target.exists():
      target = workdir / _QUARANTINE / f'{step}.{number}'
      number += 1
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      source.rename(target)
    except OSError as error:
      reason = orbax_internals.describe(error)
      raise errors.CheckpointError(f'cannot move {source} to {target}: {reason}') from error
    logging.warning(f'Moved the corrupt checkpoint {step} to {target}.')


def _remove_incomplete(workdir: epath.Path) -> None:
  """Deletes checkpoints that a killed process or a full disk left incomplete.

  An incomplete checkpoint has a temporary name or, on object stores, lacks its commit file. Orbax's
  `cleanup_tmp_directories` does not name the deleted steps, and stops if it cannot delete one.
  """
  folder = workdir / restore.FOLDER
  with contextlib.suppress(OSError):  # The folder cannot be listed. `_open_manager` tries again.
    complete = set(restore.list_steps(workdir))
    for path in list(folder.iterdir()) if folder.exists() else ():
      step, suffix, _ = path.name.partition(ocp.path.atomicity_types.TMP_DIR_SUFFIX)
      if not step.isdecimal() or (not suffix and int(step) in complete):
        continue
      with contextlib.suppress(OSError):
        path.rmtree()
        logging.info(f'Deleted the incomplete checkpoint {step}.')
