"""Checkpoints: the training state and the place in the data, written together by Orbax."""

import grain
import jax
import orbax.checkpoint as ocp

from farmer_jax import config as config_lib


class Checkpoints:
  """The checkpoints of one run, under WORKDIR/checkpoints/<step>/; saving is asynchronous."""

  def __init__(self, workdir, keep=None):
    policies = ocp.checkpoint_managers
    preserve = policies.LatestN(keep) if keep else policies.PreserveAll()
    self._manager = ocp.CheckpointManager(
      workdir / 'checkpoints',
      options=ocp.CheckpointManagerOptions(preservation_policy=preserve),
    )

  def latest_step(self):
    """The newest step, or None."""
    return max(self._manager.all_steps(), default=None)

  def save(self, step, state, iterator):
    """Starts writing `state` and the position of the Grain `iterator`."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), dataset=grain.checkpoint.CheckpointSave(iterator)
      ),
      force=True,
    )

  def restore(self, step, state, iterator):
    """Reads a checkpoint; `state` gives shapes, dtypes and placement. Moves `iterator` to its
    place."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_abstract(state)),
        dataset=grain.checkpoint.CheckpointRestore(iterator),
      ),
    )
    return restored.state

  def close(self):
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def restore_state(workdir, state):
  """The newest training state of the run in `workdir`, and its step, for jobs that do not train."""
  checkpoints = Checkpoints(workdir)
  step = checkpoints.latest_step()
  if step is None:
    raise config_lib.ConfigError(f'{workdir} has no checkpoint yet; train it first')
  restored = checkpoints._manager.restore(
    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(state)))
  )
  checkpoints.close()
  return restored.state, step


def _abstract(state):
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
