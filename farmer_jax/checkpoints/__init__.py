"""Checkpoints of the training state and of the data iterator, written by Orbax.

Both are independent of the mesh and of the number of processes, so that a run can resume with
others.

Orbax 0.12.8 provides: asynchronous saving by several processes, the atomic rename of a complete
checkpoint, the file format, retention policies. It does not provide what this package adds:

* `checksums`: Orbax restores a flipped bit of an array as a wrong number. The checksums of all
  arrays are saved as the item `manifest` and are compared after each restore.
* `restore`: `CheckpointManager.restore` does not fall back to an older checkpoint when the newest
  one is corrupt. `Checkpointer.restore_latest` does, in all processes together.
* `checkpointer`: after a failed save, `CheckpointManager` can neither save nor close.
  `Checkpointer` reports the failure, reopens the manager and saves the next checkpoint. The
  validation losses that decide which checkpoints are kept come from the manifests: the manager
  would read the metadata of every checkpoint, one of which may be corrupt.
* `orbax_internals`: processes that wait for a failed process do so until a timeout of minutes. A
  barrier that compares keys raises at once.
"""

from farmer_jax.checkpoints.checkpointer import Checkpointer as Checkpointer
from farmer_jax.checkpoints.restore import restore_params as restore_params
