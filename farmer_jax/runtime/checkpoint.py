"""Checkpoints: the training state and the place in the data, written together by Orbax.

Both are the same whatever the mesh and the number of processes: a run may go on with others.
"""

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of one run, under WORKDIR/checkpoints/<step>/; saving is asynchronous."""

  def __init__(self, workdir, keep):
    preserve = ocp.checkpoint_managers.LatestN(keep)
    self._manager = ocp.CheckpointManager(
      workdir / 'checkpoints',
      options=ocp.CheckpointManagerOptions(preservation_policy=preserve),
    )

  def all_steps(self):
    """The steps of all checkpoints, the newest last."""
    return sorted(self._manager.all_steps())

  def latest_step(self):
    """The newest step, or None."""
    return max(self.all_steps(), default=None)

  def save(self, step, state, iterator):
    """Starts writing `state` and the position of the `iterator`."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), dataset=ocp.args.JsonSave(iterator.get_state())
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
        dataset=ocp.args.JsonRestore(),
      ),
    )
    iterator.set_state(restored.dataset)
    return restored.state

  def restore_params(self, step, name, params):
    """Reads nothing but the parameters of a checkpoint, to this process's first device.

    Args:
      step: which checkpoint.
      name: the field of the training state: 'params' or 'average'.
      params: a tree that gives shapes and dtypes.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
      name: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), params)
    }
    read = ocp.args.PyTreeRestore(
      item=target,
      restore_args=ocp.checkpoint_utils.construct_restore_args(target),
      partial_restore=True,
    )
    return self._manager.restore(step, args=ocp.args.Composite(state=read)).state[name]

  def close(self):
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def _abstract(state):
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
