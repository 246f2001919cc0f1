"""Measures training steps on this machine: images/s of settings in turns, and times of the parts.

    python -m benchmarks.training_speed
    python -m benchmarks.training_speed --models=rgb64 --settings=,scan_unroll=1,attention=xla

Each item of --settings is KEY=VALUE of the section `model`, or empty for the default. The steps of
all settings run in turns, on random images. Prints Markdown tables.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import timing
from configs import fashion_mnist, photo_crops
from farmer_jax import config as config_lib
from farmer_jax import losses
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.nn import farmer
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import step as step_lib
from farmer_jax.xla import host

_MODELS = flags.DEFINE_list('models', ['rgb64', 'rgb32', 'fashion_mnist'], 'Models to measure.')
_SETTINGS = flags.DEFINE_list('settings', ['', 'scan_unroll=1'], 'Settings of the model.')
_REPEATS = flags.DEFINE_integer('repeats', 10, 'Timed steps per setting.')


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
    return lowered.compile(step_lib.COMPILER_OPTIONS.get(jax.default_backend()))

  def compile_gradient(self, batch_size: int, with_backward: bool) -> jax.stages.Compiled:
    """Returns the compiled loss, with or without its gradient."""
    function = jax.value_and_grad(self._loss, has_aux=True) if with_backward else self._loss
    state, batch = self.state(), self.batch(batch_size)
    with self._mesh.activate():
      lowered = jax.jit(lambda params, batch: function(params, batch, 0, 0)).lower(
        state.params, batch
      )
    return lowered.compile(step_lib.COMPILER_OPTIONS.get(jax.default_backend()))

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


def model_values(name: str) -> Any:
  """Returns the ConfigDict of a model of `--models`."""
  if name == 'fashion_mnist':
    return fashion_mnist.get_config()
  values = photo_crops.get_config()
  if name == 'rgb64':
    values.data.image_size = 64
    values.train.batch_size = 8
    values.model.flow.update(blocks=4, layers=3, width=256)
    values.model.prior.update(layers=3, width=256, informative_channels=24)
  return values


def speed_rows(name: str) -> Any:
  """Yields one table row per setting."""
  calls, millions, compile_seconds = {}, {}, {}
  for setting in _SETTINGS.value:
    values = model_values(name)
    if setting:
      key, _, value = setting.partition('=')
      values.model[key] = type(values.model[key])(value)
    config = config_lib.from_config_dict(values)
    step, size, start = TrainingStep(config), config.train.batch_size, time.perf_counter()
    compiled, state = step.compile(size), step.state()
    compile_seconds[setting] = time.perf_counter() - start
    millions[setting] = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6
    calls[setting] = stepper(compiled, state, step.batch(size))
  for setting, seconds in timing.medians(calls, _REPEATS.value).items():
    yield {
      'model': f'{name}, {millions[setting]:.2f} M parameters, batch {size}',
      'settings': setting or 'default',
      'ms/step': f'{1e3 * seconds:.0f}',
      'images/s': f'{size / seconds:.1f}',
      'compilation, s': f'{compile_seconds[setting]:.1f}',
    }


def part_row(name: str) -> dict[str, str]:
  """Returns a table row with the shares of the forward pass, backward pass and optimizer."""
  config = config_lib.from_config_dict(model_values(name))
  step, size = TrainingStep(config), config.train.batch_size
  state, batch = step.state(), step.batch(size)
  calls = {
    backward: functools.partial(step.compile_gradient(size, backward), state.params, batch)
    for backward in (False, True)
  }
  calls['step'] = stepper(step.compile(size), step.state(), batch)
  forward, gradient, whole = timing.medians(calls, _REPEATS.value).values()
  shares = {
    'forward': forward,
    'backward': gradient - forward,
    'optimizer': whole - gradient,
  }
  return {'model': name} | {part: f'{seconds / whole:.0%}' for part, seconds in shares.items()}


def main(argv: list[str]) -> None:
  """Prints the tables."""
  del argv
  host.configure_malloc()
  print(f'{jax.devices()[0].device_kind}, JAX {jax.__version__}\n')
  timing.print_table(row for name in _MODELS.value for row in speed_rows(name))
  print()
  timing.print_table(map(part_row, _MODELS.value))


if __name__ == '__main__':
  app.run(main)
