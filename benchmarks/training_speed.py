"""Measures training steps on this machine: images/s of settings in turns, and times of the parts.

    python -m benchmarks.training_speed
    python -m benchmarks.training_speed --models=rgb64 --settings=,scan_unroll=1,attention=xla

Each item of --settings is KEY=VALUE of the section `model`, or empty for the default. The steps of
all settings run in turns, on random images. Prints Markdown tables.
"""

import functools
import time
from typing import Any

import jax
from absl import app, flags

from benchmarks import timing, training_step
from configs import fashion_mnist, photo_crops
from farmer_jax import config as config_lib
from farmer_jax.xla import host

_MODELS = flags.DEFINE_list('models', ['rgb64', 'rgb32', 'fashion_mnist'], 'Models to measure.')
_SETTINGS = flags.DEFINE_list('settings', ['', 'scan_unroll=1'], 'Settings of the model.')
_REPEATS = flags.DEFINE_integer('repeats', 10, 'Timed steps per setting.')


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
    step, size, start = (
      training_step.TrainingStep(config),
      config.train.batch_size,
      time.perf_counter(),
    )
    compiled, state = step.compile(size), step.state()
    compile_seconds[setting] = time.perf_counter() - start
    millions[setting] = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6
    calls[setting] = training_step.stepper(compiled, state, step.batch(size))
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
  step, size = training_step.TrainingStep(config), config.train.batch_size
  state, batch = step.state(), step.batch(size)
  calls = {
    backward: functools.partial(step.compile_gradient(size, backward), state.params, batch)
    for backward in (False, True)
  }
  calls['step'] = training_step.stepper(step.compile(size), step.state(), batch)
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
