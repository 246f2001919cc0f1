"""Checkpoints of the training state and of the data iterator, written by Orbax.

A run can resume with another mesh and another number of processes.

Orbax 0.12.8 provides asynchronous saving by several processes, the atomic rename of a complete
checkpoint, the file format, and retention policies. This package adds:

* `checksums`: if a bit of a stored array flips, Orbax restores a wrong value. The checksums of all
  arrays are saved as the item `manifest` and are compared after each restore.
* `restore`: `CheckpointManager.restore` does not fall back to an older checkpoint when the newest
  one is corrupt. `Checkpointer.restore_latest` does, in all processes together.
* `checkpointer`: after a failed save, `CheckpointManager` can neither save nor close.
  `Checkpointer` reports the failure, reopens the manager and saves the next checkpoint. The
  retention policy reads the scores of checkpoints from the manifests, because the manager would
  read the metadata of every checkpoint, which may be corrupt.
* `orbax_internals`: at Orbax's barriers, processes wait several minutes for a failed process. The
  barrier of this module raises an error at once.
"""

from farmer_jax.checkpoints.checkpointer import Checkpointer as Checkpointer
from farmer_jax.checkpoints.restore import check_step as check_step
from farmer_jax.checkpoints.restore import list_steps as list_steps
from farmer_jax.checkpoints.restore import newest_step as newest_step
from farmer_jax.checkpoints.restore import restore_params as restore_params
