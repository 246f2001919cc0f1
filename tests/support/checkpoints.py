"""A small training state, and helpers that save, restore and corrupt its checkpoints."""

import contextlib
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from farmer_jax import checkpoints, config

STEPS = (2, 4, 6)


class Iterator:
  """Replaces the data iterator. `batches` is the number of batches that were read."""

  def __init__(self, batches=0):
    self.batches = batches

  def get_state(self):
    return {'batches': self.batches, 'examples': 1617, 'batch_size': 16, 'seed': 0}

  def set_state(self, state):
    self.batches = state['batches']


def make_state(step):
  """Returns a state with arrays of several dtypes, nested like a training state."""
  keys = jax.random.split(jax.random.key(step), 3)
  return {
    'step': jnp.int32(step),
    'params': {
      'kernel': jax.random.normal(keys[0], (48, 40)),
      'scale': jax.random.normal(keys[1], (17,), jnp.bfloat16),
    },
    'opt_state': (jax.random.bits(keys[2], (3, 5), jnp.uint32), {'count': jnp.int32(step)}),
  }


def open_checkpointer(workdir, keep=9, **train):
  return checkpoints.Checkpointer(epath.Path(workdir), config.Train(keep_checkpoints=keep, **train))


def save(workdir, steps=STEPS, losses=None, keep=9, **train):
  """Restores the newest checkpoint, if there is one, and saves the states of `steps`."""
  checkpointer = open_checkpointer(workdir, keep, **train)
  checkpointer.restore_latest(make_state(0), Iterator())
  for step in steps:
    checkpointer.save(step, make_state(step), Iterator(step), (losses or {}).get(step))
  checkpointer.close()


def restore(workdir, checkpointer=None):
  """Returns the state, the step and the iterator state of the newest valid checkpoint."""
  iterator = Iterator()
  checkpointer = checkpointer or open_checkpointer(workdir)
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), make_state(0)
  )
  state, step = checkpointer.restore_latest(shapes, iterator)
  return state, step, iterator.batches


def assert_restored(restored, step):
  """Asserts that `restore` returned exactly the values that were saved at `step`."""
  state, found_step, batches = restored
  assert (found_step, batches) == (step, step)
  jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


def list_steps(workdir):
  """Returns the names of all folders in WORKDIR/checkpoints as integers."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def largest_file(workdir, step):
  """Returns the largest file of array data."""
  files = (workdir / 'checkpoints' / str(step) / 'state').glob('ocdbt.process_0/d/*')
  return max(files, key=lambda path: path.stat().st_size)


def flip_bit(path, position=0.5):
  data = bytearray(path.read_bytes())
  data[int(position * len(data))] ^= 4
  path.write_bytes(data)


def truncate(workdir, step):
  path = largest_file(workdir, step)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(workdir, step):
  shutil.rmtree(workdir / 'checkpoints' / str(step))
  (workdir / 'checkpoints' / str(step)).mkdir()


def change_json(workdir, step, item, **changes):
  """Changes values of a JSON item."""
  path = workdir / 'checkpoints' / str(step) / item / 'metadata'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextlib.contextmanager
def file_size_limit(size):
  """Context in which this process cannot write files of more than `size` bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
