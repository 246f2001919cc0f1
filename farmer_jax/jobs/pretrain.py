"""`--job=pretrain`: trains flow and prior together, end to end."""

import functools
import time

import jax
import numpy as np

from farmer_jax import objectives, sampling
from farmer_jax.data import pipeline, sources
from farmer_jax.evaluation import figures, likelihood
from farmer_jax.nn import farmer
from farmer_jax.runtime import console, metrics
from farmer_jax.runtime import workdir as workdir_lib
from farmer_jax.training import loop
from farmer_jax.training import optimizer as optimizer_lib


def run(config, workdir):
  """Trains, validates and draws samples; prints where the results lie."""
  train_source = sources.load(config.data, 'train')
  valid_source = sources.load(config.data, 'valid')
  workdir = workdir_lib.prepare(config, workdir)
  workdir_lib.write_class_names(workdir, train_source.class_names)
  console.say(f'{len(train_source)} training and {len(valid_source)} validation images.')
  start = time.monotonic()
  model = farmer.build(config)
  evaluator = likelihood.LikelihoodEvaluator(model, config)
  sampler = sampling.Sampler(model, config)

  def validate(params):
    settings = config.train
    batches = pipeline.valid_batches(
      valid_source,
      settings.valid_batch_size,
      settings.valid_examples,
      threads=config.data.threads,
    )
    return evaluator(params, batches)

  def draw(params, step):
    return _draw_grid(sampler, params, config, train_source.class_names, _grid_path(workdir, step))

  iterator = pipeline.train_iterator(
    train_source, config.data, config.train.batch_size, config.seed
  )
  noise_std = optimizer_lib.noise_std_schedule(config.noise, config.train.steps)
  _, valid = loop.train(
    config,
    workdir,
    init_params=functools.partial(farmer.init_params, model=model),
    loss_fn=functools.partial(objectives.nll_loss, model=model, config=config, noise_std=noise_std),
    iterator=iterator,
    validate=validate,
    draw=draw,
  )
  curves = workdir / 'figures' / 'curves.png'
  figures.training_curves(curves, metrics.read(workdir), config.name)
  _report(config, workdir, valid, len(valid_source), time.monotonic() - start)


def _grid_path(workdir, step):
  return workdir / 'samples' / f'{step}.png'


def _draw_grid(sampler, params, config, class_names, path):
  """Draws a sample grid, a row a class, saves it at `path` and returns it."""
  labels = sampling.grid_labels(config)
  samples = jax.device_get(sampler(params, labels.reshape(-1), np.arange(labels.size)))
  if not samples.finite.all():
    console.say(f'{(~samples.finite).sum()} of {labels.size} samples are not finite.')
  names = [class_names[row[0]] for row in labels] if class_names else ()
  grid = figures.sample_grid(
    samples.images.reshape(*labels.shape, *samples.images.shape[1:]), names
  )
  figures.save_png(path, grid)
  return grid


def _report(config, workdir, valid, examples, seconds):
  """The closing lines on standard output."""
  examples = min(examples, config.train.valid_examples or examples)
  print(f'Finished after {seconds / 60:.1f} minutes.')
  if 'bits_per_dim' in valid:
    print(f'Held-out likelihood ({examples} images): {valid["bits_per_dim"]:.3f} bits/dim')
  elif valid:
    figure = f'{valid["loss"]:.3f} nats/dim (density at noise σ = {valid["noise_std"]:g})'
    print(f'Held-out likelihood ({examples} images): {figure}')
  if config.train.sample_every:
    print(f'Samples: {_grid_path(workdir, config.train.steps)}')
  print(f'Curves:  {workdir / "figures" / "curves.png"}')
