"""Hooks of the training jobs: validation and grids of samples."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax import sampling
from farmer_jax.data import base, pipeline
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.evaluation import figures
from farmer_jax.nn import farmer
from farmer_jax.training import hooks

Params = dict[str, Any]


def validation_hook(
  config: config_lib.Config,
  source: base.Source,
  mesh: mesh_lib.Mesh,
  evaluator: Callable[[Params, Any], dict[str, float]],
) -> hooks.Validation:
  """Returns a hook that calls evaluator(params, batches) -> metrics on the validation split."""
  index, count = mesh.process_shard()

  def evaluate(params: Params) -> dict[str, float]:
    batches = pipeline.evaluation_batches(
      source,
      mesh.round_up(config.train.valid_batch_size),
      config.train.valid_examples,
      process_index=index,
      process_count=count,
      data=config.data,
      skip_bad_examples=True,
    )
    return evaluator(params, map(mesh.global_batch, batches))

  return hooks.Validation(evaluate)


def sample_hook(
  config: config_lib.Config,
  workdir: epath.Path,
  mesh: mesh_lib.Mesh,
  class_names: tuple[str, ...],
  model: farmer.Farmer,
  sampling_params: Callable[[Params], Params] = lambda params: params,
) -> hooks.Hook:
  """Returns a hook that draws a grid of samples, one class per row.

  `sampling_params` converts trained parameters to the parameters for sampling.
  """
  sampler = sampling.Sampler(model, config, out_shardings=mesh.replicated)
  labels = sampling.grid_labels(config)
  row_names = [class_names[row[0]] for row in labels] if class_names else ()

  def draw(info: hooks.StepInfo) -> None:
    params = sampling_params(info.state.evaluation_params)
    samples = jax.device_get(sampler(params, labels.reshape(-1), np.arange(labels.size)))
    if not samples.finite.all():
      logging.warning(f'{(~samples.finite).sum()} of {labels.size} samples are not finite.')
    images = samples.images.reshape(*labels.shape, *samples.images.shape[1:])
    grid = figures.sample_grid(images, row_names)
    if not jax.process_index():
      figures.save_png(grid_path(workdir, info.step), grid)
    info.writer.write_image(info.step, 'samples', grid)

  return hooks.Hook(draw, config.train.sample_every)


def grid_path(workdir: epath.Path, step: int) -> epath.Path:
  """Returns the path of the sample grid of a step."""
  return workdir / 'samples' / f'{step}.png'
