"""What the jobs that train have in common."""

import contextlib
import dataclasses
import time

import jax
import numpy as np

from farmer_jax import errors, sampling, terminal
from farmer_jax.data import base, pipeline, sources
from farmer_jax.distributed import mesh, processes
from farmer_jax.evaluation import figures
from farmer_jax.training import loop
from farmer_jax.workdir import layout, lock, metrics
from farmer_jax.xla import host


@dataclasses.dataclass(frozen=True)
class Data:
  """Both splits of the configured images."""

  train: base.Source
  valid: base.Source


def load_data(config):
  """The `Data`; mistakes in their configuration show before a workdir is claimed."""
  return Data(*(sources.load(config.data, split) for split in ('train', 'valid')))


def make_mesh(config, devices=None):
  """The `mesh.Mesh` to train on, of all devices or of those given."""
  found, settings = mesh.Mesh(config.mesh, devices), config.train
  if settings.batch_size % (found.batch_parts * settings.accumulate):
    raise errors.ConfigError(
      f'config.train.batch_size={settings.batch_size} cannot be divided among the'
      f' {found.batch_parts} devices along data and fsdp and the config.train.accumulate='
      f'{settings.accumulate} parts of a batch; make it a multiple of both together'
    )
  return found


def claim_workdir(config, workdir):
  """The workdir, ready for this run; of several processes the first prepares it."""
  processes.by_first(lambda: layout.prepare(config, workdir))
  workdir = layout.open_run(config, workdir)
  host.cache_compilations(workdir)
  return workdir


def claim(config, workdir, data):
  """The same, with the names of the classes in it."""
  workdir = claim_workdir(config, workdir)
  if not jax.process_index():
    layout.write_class_names(workdir, data.train.class_names)
  terminal.say(f'{len(data.train)} training and {len(data.valid)} validation images.')
  return workdir


def train(
  config, workdir, data, mesh, *, model, evaluator, complete=lambda params: params, **objective
):
  """Trains, validates, draws sample grids and, at the end, the curves; prints where they lie.

  Args:
    config: `config.Config`.
    workdir: a claimed workdir.
    data: `Data`.
    mesh: a `mesh.Mesh`.
    model: a `farmer.Farmer`.
    evaluator: evaluator(params, batches) -> validation metrics.
    complete: makes the model's parameters, to sample with, of those that are trained.
    **objective: init_params, loss_fn, constants, as `loop.train` takes them.

  Returns:
    The final `TrainState`, the last validation metrics, and the number of images these are of.
  """
  start, settings = time.monotonic(), config.train
  sampler = sampling.Sampler(model, config, out_shardings=mesh.whole)
  share = mesh.share()

  def validate(params):
    batches = pipeline.valid_batches(
      data.valid,
      mesh.batch_size(settings.valid_batch_size),
      settings.valid_examples,
      share[0],
      share[1],
      config.data.threads,
      data=config.data,
    )
    return evaluator(params, map(mesh.batch, batches))

  def draw(params, step):
    path = _grid_path(workdir, step)
    return _draw_grid(sampler, complete(params), config, data.train.class_names, path)

  iterator = pipeline.train_iterator(
    data.train, config.data, settings.batch_size, config.seed, *share
  )
  with contextlib.ExitStack() as held, mesh(), contextlib.closing(iterator):
    processes.by_first(lambda: held.enter_context(lock.held(workdir)))
    state, valid = loop.train(
      config, workdir, mesh, iterator=iterator, validate=validate, draw=draw, **objective
    )
  curves = workdir / 'figures' / 'curves.png'
  if not jax.process_index():
    figures.training_curves(curves, metrics.read(workdir), config.name)
  terminal.tell(f'Finished after {(time.monotonic() - start) / 60:.1f} minutes.')
  if settings.sample_every:
    terminal.tell(f'Samples: {_grid_path(workdir, settings.steps)}')
  terminal.tell(f'Curves:  {curves}')
  return state, valid, min(len(data.valid), settings.valid_examples or len(data.valid))


def _grid_path(workdir, step):
  return workdir / 'samples' / f'{step}.png'


def _draw_grid(sampler, params, config, class_names, path):
  """Draws a sample grid, a row a class, saves it at `path` and returns it."""
  labels = sampling.grid_labels(config)
  samples = jax.device_get(sampler(params, labels.reshape(-1), np.arange(labels.size)))
  if not samples.finite.all():
    terminal.say(f'{(~samples.finite).sum()} of {labels.size} samples are not finite.')
  names = [class_names[row[0]] for row in labels] if class_names else ()
  grid = figures.sample_grid(
    samples.images.reshape(*labels.shape, *samples.images.shape[1:]), names
  )
  if not jax.process_index():
    figures.save_png(path, grid)
  return grid
