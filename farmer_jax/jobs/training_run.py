"""Code that the training jobs share: data, mesh, workdir and the final report."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax import terminal
from farmer_jax.data import base, pipeline, sources
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.distributed import processes
from farmer_jax.errors import ConfigError
from farmer_jax.evaluation import figures
from farmer_jax.jobs import training_hooks
from farmer_jax.workdir import layout, lock, metrics
from farmer_jax.xla import host


@dataclasses.dataclass(frozen=True)
class Resources:
  """Data and mesh of a run, loaded before the workdir is claimed to find errors first."""

  train: base.Source
  valid: base.Source
  mesh: mesh_lib.Mesh

  @classmethod
  def load(cls, config: config_lib.Config) -> 'Resources':
    """Opens both splits of the data and creates the mesh."""
    train, valid = (sources.load(config.data, split) for split in ('train', 'valid'))
    return cls(train, valid, make_mesh(config))

  def num_validated(self, config: config_lib.Config) -> int:
    """Returns the number of images that validation uses."""
    return min(len(self.valid), config.train.valid_examples or len(self.valid))


def make_mesh(config: config_lib.Config, devices: list[jax.Device] | None = None) -> mesh_lib.Mesh:
  """Returns the mesh of `devices`, by default of all devices.

  Raises:
    ConfigError: the batch cannot be divided among the devices and the microbatches.
  """
  mesh, train = mesh_lib.Mesh(config.mesh, devices), config.train
  if train.batch_size % (mesh.batch_shards * train.accumulation_steps):
    raise ConfigError(
      f'--config.train.batch_size={train.batch_size} must be a multiple of {mesh.batch_shards} (the'
      ' devices along the mesh axes data and fsdp) times'
      f' --config.train.accumulation_steps={train.accumulation_steps}'
    )
  return mesh


def claim_workdir(config: config_lib.Config, workdir: epath.PathLike) -> epath.Path:
  """Claims the workdir on process 0. Returns the absolute path on all processes."""
  processes.on_process_zero(lambda: layout.claim(config, workdir))
  path = layout.open_run(config, workdir)
  host.enable_compilation_cache(path)
  return path


def prepare_workdir(
  config: config_lib.Config, workdir: epath.PathLike, resources: Resources
) -> epath.Path:
  """Claims the workdir and stores the class names in it. Returns the absolute path."""
  path = claim_workdir(config, workdir)
  if not jax.process_index():
    layout.write_class_names(path, resources.train.class_names)
  logging.info(f'{len(resources.train)} training images, {len(resources.valid)} validation images.')
  return path


@contextlib.contextmanager
def training_context(
  config: config_lib.Config, workdir: epath.Path, resources: Resources
) -> Iterator[pipeline.TrainIterator]:
  """Context of a training run. Yields the training iterator.

  Holds the lock of the workdir and activates the mesh. At the end, draws the training curves and
  prints the paths of the results.
  """
  start, mesh = time.monotonic(), resources.mesh
  iterator = pipeline.TrainIterator(
    resources.train, config.data, config.train.batch_size, config.seed, *mesh.process_shard()
  )
  with contextlib.ExitStack() as stack, mesh.activate(), contextlib.closing(iterator):
    processes.on_process_zero(lambda: stack.enter_context(lock.hold(workdir)))
    yield iterator
  curves = workdir / 'figures' / 'curves.png'
  if not jax.process_index():
    figures.training_curves(curves, metrics.read(workdir), config.name)
  terminal.print_result(f'Finished after {(time.monotonic() - start) / 60:.1f} minutes.')
  if config.train.sample_every:
    terminal.print_result(f'Samples: {training_hooks.grid_path(workdir, config.train.steps)}')
  terminal.print_result(f'Curves:  {curves}')
