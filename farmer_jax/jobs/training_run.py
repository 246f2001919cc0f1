"""What the training jobs prepare: data, mesh and workdir."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from farmer_jax import checkpoints
from farmer_jax import config as config_lib
from farmer_jax.data import base, pipeline, sources
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.distributed import processes
from farmer_jax.errors import ConfigError, WorkdirError
from farmer_jax.training import start as start_lib
from farmer_jax.workdir import layout, lock
from farmer_jax.xla import host

# Describes the training and the validation images of a run: number, classes, folder.
_DATA_FILE = 'data.json'


@dataclasses.dataclass(frozen=True)
class Resources:
  """Data and mesh of a run, loaded before the workdir is claimed to find errors first."""

  train: base.Source
  valid: base.Source | None  # None if validation is disabled
  mesh: mesh_lib.Mesh

  @classmethod
  def load(cls, config: config_lib.Config, class_names: Sequence[str] = ()) -> 'Resources':
    """Opens both splits of the data, with labels for `class_names`, and creates the mesh."""
    splits = ('train', 'valid') if config.train.validate_every else ('train',)
    train, *valid = (sources.load(config.data, split, class_names) for split in splits)
    return cls(train, valid[0] if valid else None, make_mesh(config))

  def validation_batches(self, config: config_lib.Config) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of the validation split on the mesh."""
    assert self.valid is not None
    index, count = self.mesh.process_shard()
    batches = pipeline.evaluation_batches(
      self.valid,
      self.mesh.round_up(config.train.valid_batch_size),
      config.train.valid_examples,
      process_index=index,
      process_count=count,
      data=config.data,
      skip_bad_examples=True,
    )
    return map(self.mesh.global_batch, batches)

  def num_validated(self, config: config_lib.Config) -> int:
    """Returns the number of images that validation uses."""
    count = 0 if self.valid is None else len(self.valid)
    return min(count, config.train.valid_examples or count)


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


def with_extensions(
  config: config_lib.Config, workdir: epath.PathLike, start: start_lib.Start | None = None
) -> config_lib.Config:
  """Returns the configuration with the extensions of the run in the workdir, if there is one.

  If `config.train.extend` extends the run, or the run of which this is a branch, the result has a
  new extension. Writes nothing. The result is the same after process 0 has claimed the workdir.
  """
  path = layout.absolute(workdir)
  is_branch = start is not None and start.branch is not None
  if (path / layout.CONFIG_FILE).exists() and not is_branch:
    return layout.extension(config, layout.read_config(path), checkpoints.newest_step(path))
  if start is None and config.job != 'distill':
    entries = filter(None, config.train.extensions.split(','))
    ends = [*(int(entry.split(':')[1]) for entry in entries), config.train.steps]
    if ends != sorted(set(ends)):
      raise ConfigError(
        f'--config.train.steps={config.train.steps} is not larger than the steps of the'
        f' configuration before it was extended ({config.train.extensions}); set'
        " --config.train.extensions='' for a plain schedule"
      )
    return config  # It repeats a run with all its extensions.
  # The configuration may be that of the source or teacher, with extensions of its own.
  train = dataclasses.replace(config.train, extensions='')
  if start and start.branch and config.train.extend != 'none':
    train = train.extending(start.source.config.train, start.branch[1])
  return dataclasses.replace(config, train=train)


def with_recorded_extensions(
  config: config_lib.Config, workdir: epath.PathLike
) -> config_lib.Config:
  """Returns the configuration with the extensions of the run in the workdir, without a new one."""
  path = layout.absolute(workdir)
  if not (path / layout.CONFIG_FILE).exists():
    return config
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, extend='none'))
  return layout.extension(config, layout.read_config(path), checkpoints.newest_step(path))


def check_branch(start: start_lib.Start | None, resources: Resources) -> None:
  """Raises WorkdirError if the training images of a branch are not those of its source."""
  if start is None or start.branch is None:
    return
  file = start.branch[0] / _DATA_FILE

  def check() -> None:
    found = base.describe(resources.train)
    before = layout.read_dict(file).get('training', found)
    if not base.is_same_content(before['content'], found['content']):
      raise WorkdirError(
        f'the training images are not those of --config.branch_from ({file}: {before["images"]}'
        f' images, now {found["images"]}); use its images, or start with --config.init_from'
      )

  processes.on_process_zero(check)


def prepare_workdir(
  config: config_lib.Config, workdir: epath.PathLike, resources: Resources | None = None
) -> epath.Path:
  """Claims the workdir on process 0. Returns the absolute path on all processes.

  With `resources`, also checks, logs and records the data. Nothing is written to a workdir that is
  refused.

  Raises:
    WorkdirError: the run was started with other classes or with other training images.
  """

  def claim() -> None:
    path = layout.absolute(workdir)
    is_run = (path / layout.CONFIG_FILE).exists()
    if config.train.extend != 'none' and not is_run and not config.branch_from:
      logging.warning(f'config.train.extend has no effect: {path} has no run yet.')
    with contextlib.ExitStack() as stack:
      # An extension must not change the configuration of a run that is training.
      if config.train.extend != 'none' and is_run:
        stack.enter_context(lock.hold(path))
      step = checkpoints.newest_step(path)
      changed = layout.check_claim(config, path, step)
      if config.train.extend != 'none' and is_run and 'train.extensions' not in changed:
        _warn_if_not_extended(config.train, step)
      data = _checked_data(path, resources) if resources else {}
      layout.claim(config, path, step)
      if resources:
        layout.write_class_names(path, resources.train.class_names)
        layout.write_json(path / _DATA_FILE, data)

  processes.on_process_zero(claim)
  path = layout.open_run(config, workdir)
  host.enable_compilation_cache(path)
  return path


def _warn_if_not_extended(train: config_lib.Train, step: int) -> None:
  """Warns that `train.extend` does not extend a run of `train.steps` steps, now at `step`.

  A command that extended a run and was interrupted can be started again without a warning.
  """
  if step < train.steps and train.extensions.endswith(f':{train.extend}'):
    return
  state = 'has finished its' if step == train.steps else 'already has'
  logging.warning(
    f'config.train.extend has no effect: the run {state} {train.steps} steps. To continue it'
    ' further, set a larger --config.train.steps.'
  )


def _checked_data(workdir: epath.Path, resources: Resources) -> dict[str, Any]:
  """Compares the data with those of the first start. Returns the content of data.json."""
  data = {'training': base.describe(resources.train)}
  if resources.valid is not None:
    data['validation'] = base.describe(resources.valid)
  names, saved_names = resources.train.class_names, layout.read_class_names(workdir)
  if saved_names and names != saved_names:
    missing, new = sorted(set(saved_names) - set(names)), sorted(set(names) - set(saved_names))
    raise WorkdirError(
      f'the classes of the data are not those of the run {workdir} (missing:'
      f' {", ".join(missing) or "none"}; new: {", ".join(new) or "none"}); restore the classes, or'
      ' train into another --workdir'
    )
  file = workdir / _DATA_FILE
  saved = layout.read_dict(file)
  for split, found in data.items():
    before = saved.get(split, found)
    if base.is_same_content(before['content'], found['content']):
      continue
    problem = (
      f'the {split} images are not those of the first start of the run {workdir} ({file.name}:'
      f' {before["images"]} images, now {found["images"]})'
    )
    if split == 'training':
      raise WorkdirError(f'{problem}; restore the images, or train into another --workdir')
    logging.warning(f'{problem}. Validation losses cannot be compared with earlier ones.')
  return data | saved  # The first start counts.
