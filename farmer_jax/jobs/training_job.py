"""What the training jobs do with their data: validation, sample grids, the loop and the curves."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from farmer_jax import checkpoints, sampling, terminal
from farmer_jax import config as config_lib
from farmer_jax.data import pipeline
from farmer_jax.distributed import processes
from farmer_jax.evaluation import figures, training_fidelity
from farmer_jax.jobs.training_run import Resources
from farmer_jax.nn import farmer
from farmer_jax.training import divergence, hooks, loop
from farmer_jax.training import start as start_lib
from farmer_jax.training.step import LossFn, Params, TrainState
from farmer_jax.workdir import layout, lock, metrics, tracker
from farmer_jax.xla import memory


def train(
  config: config_lib.Config,
  workdir: epath.Path,
  resources: Resources,
  model: farmer.Farmer,
  evaluator: Callable[[Params, Any], dict[str, float]],
  *,
  init_params: Callable[..., Params],
  loss_fn: LossFn,
  sampling_params: Callable[[Params], Params] = lambda params: params,
  frozen: tuple[Params, ...] = (),
  diagnose: divergence.Diagnose | None = None,
  start: start_lib.Start | None = None,
) -> tuple[TrainState, dict[str, float]]:
  """Trains, validates and draws samples. Holds the lock of the workdir. Prints paths of results.

  `evaluator(params, batches)` returns the metrics of validation. `sampling_params` converts trained
  parameters to the parameters for sampling. See `loop.Trainer` for the other arguments.

  Returns:
    The final state, and the metrics of the last validation.
  """
  began, mesh = time.monotonic(), resources.mesh

  def evaluate(params: Params) -> dict[str, float]:
    with memory.explained(config, 'validation'):
      return evaluator(params, resources.validation_batches(config))

  validation = hooks.Validation(evaluate)
  fidelity = _fidelity_hook(config, workdir, resources, model, sampling_params)
  iterator = pipeline.TrainIterator(
    resources.train, config.data, config.train.batch_size, config.seed, *mesh.process_shard()
  )
  with contextlib.ExitStack() as stack, mesh.activate(), contextlib.closing(iterator):
    processes.on_process_zero(lambda: stack.enter_context(lock.hold(workdir)))
    writer = stack.enter_context(metrics.MetricWriter(workdir))
    if create := tracker.TRACKERS.get(config.tracker.kind):
      processes.on_process_zero(lambda: writer.add(create(config, workdir)))
    state = loop.Trainer(
      config,
      workdir,
      mesh,
      init_params=init_params,
      loss_fn=loss_fn,
      iterator=iterator,
      writer=writer,
      validation=validation,
      fidelity=fidelity,
      hooks=[_sample_hook(config, workdir, resources, model, sampling_params)],
      frozen=frozen,
      diagnose=diagnose,
      start=start,
    ).train()
    curves = _draw_curves(config, workdir, writer)
  terminal.print_result(f'Finished after {(time.monotonic() - began) / 60:.1f} minutes.')
  if config.train.sample_every:
    terminal.print_result(f'Samples: {_grid_path(workdir, config.train.steps)}')
  terminal.print_result(f'Curves:  {curves}')
  return state, validation.metrics


def _draw_curves(
  config: config_lib.Config, workdir: epath.Path, writer: metrics.MetricWriter
) -> epath.Path:
  """Draws the training curves in process 0. Returns their path."""
  path = workdir / 'figures' / 'curves.png'
  if not jax.process_index():
    with layout.optional_write('The training curves'):
      curves = figures.training_curves(path, metrics.read(workdir), config.name)
      writer.write_image(config.train.steps, 'curves', curves)
  return path


def _fidelity_hook(
  config: config_lib.Config,
  workdir: epath.Path,
  resources: Resources,
  model: farmer.Farmer,
  sampling_params: Callable[[Params], Params],
) -> hooks.Validation | None:
  """Returns a hook that measures the quality of samples, or None if it is disabled."""
  if not config.train.fidelity_every:
    return None
  measure = training_fidelity.FidelityEvaluator(
    config, model, resources.mesh, resources.train.class_names, workdir
  )
  # Errors are found before training. A finished run measures nothing, unless its last checkpoint is
  # corrupt and it trains again. Then the first measurement loads the network.
  if processes.gather(checkpoints.newest_step(workdir))[0] < config.train.steps:
    measure.load()
  return hooks.Validation(
    lambda params: measure(sampling_params(params)), 'fidelity', training_fidelity.lowest_distance
  )


def _sample_hook(
  config: config_lib.Config,
  workdir: epath.Path,
  resources: Resources,
  model: farmer.Farmer,
  sampling_params: Callable[[Params], Params],
) -> hooks.Hook:
  """Returns a hook that draws a grid of samples, one class per row."""
  sampler = sampling.Sampler(model, config, out_shardings=resources.mesh.replicated)
  labels, class_names = sampling.grid_labels(config), resources.train.class_names
  row_names = [class_names[row[0]] for row in labels] if class_names else ()

  def draw(info: hooks.StepInfo) -> None:
    params = sampling_params(info.state.evaluation_params)
    with memory.explained(config, 'a grid of samples'):
      samples = jax.device_get(sampler(params, labels.reshape(-1), np.arange(labels.size)))
    if not samples.finite.all():
      logging.warning(f'{(~samples.finite).sum()} of {labels.size} samples are not finite.')
    images = samples.images.reshape(*labels.shape, *samples.images.shape[1:])
    grid = figures.sample_grid(images, row_names)
    if not jax.process_index():
      with layout.optional_write('The grid of samples'):
        figures.save_png(_grid_path(workdir, info.step), grid)
    info.writer.write_image(info.step, 'samples', grid)

  return hooks.Hook(draw, config.train.sample_every)


def _grid_path(workdir: epath.Path, step: int) -> epath.Path:
  return workdir / 'samples' / f'{step}.png'
