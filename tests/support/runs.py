"""A run of a tiny model, for tests of jobs and of the Python API."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax import checkpoints, teacher
from farmer_jax import config as config_lib
from farmer_jax.data import pipeline
from farmer_jax.jobs import training_run
from farmer_jax.nn import farmer, student
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import step as step_lib
from farmer_jax.workdir import layout
from tests.support import models

CONFIG = config_lib.Config(
  name='tiny',
  data=config_lib.Data(source='digits', image_size=8),
  model=config_lib.Model(
    patch_size=2,
    flow=config_lib.Flow(blocks=2, layers=1, width=16, head_dim=8),
    prior=config_lib.Prior(
      layers=1, width=16, head_dim=8, condition_copies=2, components=3, informative_channels=2
    ),
  ),
  train=config_lib.Train(
    steps=3, batch_size=16, ema_decay=0.5, validate_every=0, sample_every=0, checkpoint_every=3
  ),
)


def training_config(**train):
  """Returns a configuration for training of 8 steps, with changes of the section `train`."""
  changes = dict(steps=8, accumulation_steps=2, ema_decay=0.9, log_every=1)
  changes |= dict(validate_every=4, checkpoint_every=2)
  return models.replace(CONFIG, data=dict(flip=True), train=changes | train)


def save_run(workdir, config=CONFIG):
  """Writes a workdir like the workdir of a finished training run, and returns it.

  No training step is compiled. The EMA has random values without zeros. The parameters that only
  training uses are zero. With `config.teacher`, the run is one of distillation.
  """
  resources = training_run.Resources.load(config)
  claimed = training_run.prepare_workdir(config, workdir, resources)
  params = random_parameters(config)
  if config.teacher is not None:
    record = {'step': 3, 'config': layout.read_config(config.teacher)}
    layout.write_json(claimed / teacher.RECORD_FILE, record)
  # Without `jit`, JAX compiles a program for each array.
  zeros = jax.tree.map(lambda a: jnp.asarray(np.zeros_like(a)), params)
  opt_state = jax.jit(optimizer_lib.create(config).init)(zeros)
  state = step_lib.TrainState(jnp.int32(3), zeros, opt_state, params)
  iterator = pipeline.TrainIterator(resources.train, config.data, config.train.batch_size, 0)
  checkpointer = checkpoints.Checkpointer(claimed, config.train)
  checkpointer.restore_latest(state, iterator)
  checkpointer.save(3, state, iterator)
  checkpointer.close()
  iterator.close()
  return workdir


def random_parameters(config):
  """Returns the parameters of a model or, with `config.teacher`, of a student."""
  if config.teacher is None:
    inputs = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, int)
    return models.filled_parameters(farmer.build(config), *inputs)
  inputs = jnp.zeros((1, config.num_tokens, config.token_channels)), jnp.zeros(1, int)
  return models.filled_parameters(student.build(config), *inputs, method='init_student')


def with_sampling(**changes):
  """Returns `CONFIG` with 25 images and the sequential inverse, or with the changed settings."""
  return CONFIG.with_sampling(**(dict(count=25, batch_size=8, inverse='sequential') | changes))


def read_samples(folder):
  """Returns all arrays in a folder of samples, by their names in the npz files."""
  shards = [np.load(file) for file in sorted(folder.glob('*.npz'))]
  return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0].files}


class Interrupted(Exception):
  pass


@contextlib.contextmanager
def interrupted_after(batches):
  """Expects training to be interrupted when it asks for a batch after `batches` batches.

  Yields the information of `pytest.raises` on the exception.
  """
  take = pipeline.TrainIterator.__next__

  def interrupted(self):
    if self.get_state()['batches'] == batches:
      raise Interrupted
    return take(self)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as caught:
    patch.setattr(pipeline.TrainIterator, '__next__', interrupted)
    yield caught
