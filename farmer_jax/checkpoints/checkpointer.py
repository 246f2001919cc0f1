"""Checkpoints: the training state and the place in the data, written together by Orbax.

Both are the same whatever the mesh and the number of processes: a run may go on with others. With
them goes a record of their checksums, by which `restoring` knows what is whole.
"""

import contextlib
import dataclasses
import logging
import math

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import checkpoint_managers as policies

from farmer_jax import errors, terminal
from farmer_jax.checkpoints import checksums, restore
from farmer_jax.distributed import agreement, processes

_DAMAGED = 'checkpoints_damaged'

# Seconds that processes wait for each other to finish writing.
_TIMEOUT = 1200


def _not_said_here(record):
  """Whether a line of the log is none of the tracebacks with which Orbax, several times, comments
  on a failure that is reported here."""
  own = 'orbax' in record.pathname and record.levelno == logging.ERROR
  return not own or absl_logging.get_verbosity() > absl_logging.WARNING


absl_logging.get_absl_logger().addFilter(_not_said_here)


class Checkpointer:
  """The checkpoints that a training run writes, under WORKDIR/checkpoints/<step>/.

  Saving is asynchronous. All processes make the same calls.
  """

  def __init__(self, workdir, settings):
    """Nothing is read or written yet.

    Args:
      workdir: the run's `epath.Path`.
      settings: a `config.Train`, which says what to keep.
    """
    self._workdir = workdir
    self._settings = settings
    self._losses: dict[int, float] = {}  # validation losses of checkpoints that have one
    self._open: ocp.CheckpointManager | None = None
    self._writing: int | None = None  # the step that is being written, if any
    self._failure: str | None = None  # what became of the last one, if it was not written

  def resume(self, state, iterator):
    """Goes on from the newest checkpoint that is whole.

    Those that are newer and damaged are named, and moved to WORKDIR/checkpoints_damaged/.

    Args:
      state: gives shapes, dtypes and placement; arrays, or `jax.ShapeDtypeStruct`.
      iterator: is moved to its place in the data.

    Returns:
      The state and its step; `state` itself and 0 if there is no checkpoint.

    Raises:
      ConfigError: there are checkpoints, but none is whole, or they are of another model.
    """
    self.wait()
    self._close_manager()  # It must not remember what is set aside.
    found, damaged = restore.load_state(self._workdir, state)
    processes.by_first(lambda: _set_aside(self._workdir, damaged))
    processes.by_first(lambda: _remove_unfinished(self._workdir, 'was never finished: removed'))
    if self._settings.keep_best:
      self._losses = _losses(self._workdir)
    if not found:
      return state, 0
    step, (state, position) = found
    iterator.set_state(position)
    return state, step

  def save(self, step, state, iterator, loss=None):
    """Starts writing `state` and the position of the `iterator`; `loss` is that of validation at
    this very step, if there was any.

    If the one before could not be written, or this one cannot, that is said, and the older ones
    stay.
    """
    self.wait()
    position = iterator.get_state()
    record = {
      'format': 1,
      'leaves': checksums.of_tree(state),
      restore.DATASET: checksums.of_json(position),
      'loss': loss if loss is not None and math.isfinite(loss) else None,
    }
    record['digest'] = checksums.of_json(record)
    arguments = {
      restore.STATE: ocp.args.StandardSave(state),
      restore.DATASET: ocp.args.JsonSave(position),
      restore.RECORD: ocp.args.JsonSave(record),
    }
    if record['loss'] is not None:
      self._losses[step] = loss
    self._writing, self._failure = step, None
    try:
      self._manager().save(step, args=ocp.args.Composite(**arguments), force=True)
    except Exception as error:
      # Of several processes one that stops here has left the others in the middle of it.
      if jax.process_count() > 1:
        raise
      self._give_up(step, restore.why(error))

  def close(self):
    """Waits until everything is on disk.

    Raises:
      ConfigError: the last checkpoint could not be written.
    """
    self.wait()
    self._close_manager()
    if self._failure:
      raise errors.ConfigError(
        f'{self._failure}; make room in {self._workdir} and start the same command again'
      )

  def wait(self):
    """Returns when the step that is being written is on disk, or known not to be."""
    if self._writing is None:
      return
    failure = None
    try:
      self._manager().wait_until_finished()
    except Exception as error:
      failure = restore.why(error)
    failure = agreement.first(failure)
    if failure:
      self._give_up(self._writing, failure)
    self._writing = None

  def _give_up(self, step, why):
    """Says that a step could not be written, and begins anew with what is on disk."""
    self._writing = None
    self._losses.pop(step, None)
    with contextlib.suppress(Exception):  # It has said already what it could not do.
      self._manager().close()
    self._open = None
    kept = restore.steps(self._workdir)
    newest = f'the newest is that of step {kept[-1]}' if kept else 'there is none yet'
    self._failure = f'the checkpoint of step {step} could not be written ({why}); {newest}'
    terminal.say(f'WARNING: {self._failure}. Older ones are untouched.')
    processes.by_first(lambda: _remove_unfinished(self._workdir))

  def _close_manager(self):
    if self._open:
      self._open.close()
    self._open = None

  def _manager(self):
    """Orbax's manager of what is on disk."""
    if self._open is None:
      # Again, because a thread that had failed may still have been writing.
      processes.by_first(lambda: _remove_unfinished(self._workdir))
      options = ocp.CheckpointManagerOptions(
        preservation_policy=_preservation(self._settings, self._losses),
        # Damage to old checkpoints must not keep new ones from being written.
        lightweight_initialize=True,
        async_options=ocp.AsyncOptions(
          timeout_secs=_TIMEOUT, barrier_sync_fn=agreement.make_barrier()
        ),
      )
      self._open = ocp.CheckpointManager(self._workdir / restore.FOLDER, options=options)
    return self._open


def _losses(workdir):
  """{step: validation loss} of the checkpoints that have one and can be read."""
  losses = {}
  for step in restore.steps(workdir):
    folder = workdir / restore.FOLDER / str(step)
    with contextlib.suppress(restore.Damaged, errors.ConfigError):
      record = restore.alone(lambda folder=folder: restore.read_record(folder))
      if record and record['loss'] is not None:
        losses[step] = record['loss']
  # All must keep the same.
  return {int(step): loss for step, loss in agreement.gather(losses)[0].items()}


def _preservation(settings, losses):
  """Which checkpoints stay; the newest always does."""
  wanted = [policies.LatestN(settings.keep_checkpoints)]
  if settings.keep_best:
    best = policies.BestN(
      get_metric_fn=lambda loss: loss,
      reverse=True,
      n=settings.keep_best,
      # Otherwise those of steps without validation would never go.
      keep_checkpoints_without_metrics=False,
    )
    wanted.append(_WithLosses(best, losses))
  if settings.keep_every:
    wanted.append(policies.EveryNSteps(settings.keep_every))
  return policies.AnyPreservationPolicy(wanted)


@dataclasses.dataclass
class _WithLosses(policies.PreservationPolicy):
  """Hands another policy the validation losses, also of checkpoints that were found on disk."""

  policy: policies.PreservationPolicy
  losses: dict

  def should_preserve(self, checkpoints, *, context):
    return self.policy.should_preserve(
      [dataclasses.replace(c, metrics=self.losses.get(c.step)) for c in checkpoints],
      context=context,
    )


def _set_aside(workdir, damaged):
  """Moves checkpoints out of the way of those to come."""
  for step in damaged:
    source, target = workdir / restore.FOLDER / str(step), workdir / _DAMAGED / str(step)
    number = 1
    while target.exists():
      target = workdir / _DAMAGED / f'{step}.{number}'
      number += 1
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      source.rename(target)
    except OSError as error:
      why = restore.why(error)
      raise errors.ConfigError(f'cannot move {source} to {target}: {why}') from error
    terminal.say(f'The damaged checkpoint of step {step} is now {target}')


def _remove_unfinished(workdir, said=''):
  """Removes what a process that was killed, or a full disk, left of a checkpoint; `said` of each.

  It never had its final name, or, on stores that cannot rename, never its mark of completion.
  """
  folder, finished = workdir / restore.FOLDER, set(restore.steps(workdir))
  for path in folder.iterdir() if folder.exists() else ():
    step, suffix, _ = path.name.partition('.orbax-checkpoint-tmp')
    if not step.isdecimal() or not suffix and int(step) in finished:
      continue
    with contextlib.suppress(OSError):  # It is in nobody's way, and is tried again.
      path.rmtree()
      if said:
        terminal.say(f'The checkpoint of step {step} {said}.')
