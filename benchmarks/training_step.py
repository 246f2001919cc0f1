"""The training step of a model on one device, for benchmarks."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from farmer_jax import config as config_lib
from farmer_jax import losses
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.nn import farmer
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import step as step_lib


class TrainingStep:
  """The training step of a model on one device, for any batch size, with random images."""

  def __init__(self, config: config_lib.Config):
    self.config = config
    model, self._optimizer = farmer.build(config), optimizer_lib.create(config)
    self._mesh = mesh_lib.Mesh(config.mesh, jax.devices()[:1])
    init_params = functools.partial(farmer.init_boxed_params, model=model)
    self._init = step_lib.initializer(init_params, self._optimizer, config.train.ema_decay)
    self._loss = functools.partial(losses.nll_loss, model=model, config=config)

  def compile(self, batch_size: int) -> jax.stages.Compiled:
    """Returns the compiled step."""
    train = dataclasses.replace(self.config.train, batch_size=batch_size)
    step = step_lib.make_train_step(self._loss, self._optimizer, train)
    batch = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._mesh.sharded),
      self._arrays(batch_size),
    )
    state = self._mesh.abstract(jax.eval_shape(self._init, jax.random.key(0)))
    lowered = step_lib.lower(step, self._mesh, state, batch)
    return lowered.compile(step_lib.compiler_options(jax.default_backend()))

  def compile_gradient(self, batch_size: int, with_backward: bool) -> jax.stages.Compiled:
    """Returns the compiled loss, with or without its gradient."""
    function = jax.value_and_grad(self._loss, has_aux=True) if with_backward else self._loss
    state, batch = self.state(), self.batch(batch_size)
    with self._mesh.activate():
      lowered = jax.jit(lambda params, batch: function(params, batch, 0, 0)).lower(
        state.params, batch
      )
    return lowered.compile(step_lib.compiler_options(jax.default_backend()))

  def state(self) -> step_lib.TrainState:
    """Returns the initial state."""
    with self._mesh.activate():
      return jax.jit(lambda: mesh_lib.unboxed(self._init(jax.random.key(0))))()

  def batch(self, batch_size: int) -> dict[str, jax.Array]:
    """Returns a batch of random images on the device."""
    return jax.device_put(self._arrays(batch_size), self._mesh.sharded)

  def _arrays(self, batch_size: int) -> dict[str, np.ndarray]:
    data, rng = self.config.data, np.random.default_rng(0)
    shape = batch_size, data.image_size, data.image_size, data.channels
    labels = rng.integers(0, max(data.num_classes, 1), batch_size).astype(np.int32)
    return {'image': rng.integers(0, 256, shape, np.uint8), 'label': labels}


def stepper(compiled: jax.stages.Compiled, state: Any, batch: Any) -> Any:
  """Returns a function that runs one training step and keeps the new state."""
  states = [state]

  def step() -> Any:
    states[0], metrics = compiled(states[0], batch)
    return metrics

  return step
