"""Trackers: services that show the metrics of runs. A tracker is a `metrics.Writer`."""

import os
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from farmer_jax import config as config_lib
from farmer_jax.errors import EXIT_CODE_PREEMPTED, ConfigError
from farmer_jax.workdir import layout, stores

# Seconds for the upload at the end. A job that is preempted has little time.
_FINISH_SECONDS = 60.0


class WandbRun:
  """A run of Weights & Biases. Its id is the random name of the run in run.json.

  A job that resumes continues the run there. Without a connection, the run is recorded in
  WORKDIR/wandb, and training continues.

  Raises:
    ConfigError: wandb is not installed, or nobody is logged in.
  """

  name = 'Metrics for Weights & Biases'

  def __init__(self, config: config_lib.Config, workdir: epath.Path):
    remedy = 'set --config.tracker.kind=none to train without a tracker'
    try:
      import wandb
    except ImportError as error:
      raise ConfigError(
        f'config.tracker.kind=wandb needs wandb ({error}); pip install wandb, or {remedy}'
      ) from error
    tracker = config.tracker
    in_workdir = not stores.is_store(workdir) and 'WANDB_DIR' not in os.environ
    arguments: dict[str, Any] = dict(
      project=tracker.project,
      name=tracker.name or config.name,
      tags=[tag.strip() for tag in tracker.tags.split(',') if tag.strip()] or None,
      id=layout.run_id(workdir),
      resume='allow',
      config=config_lib.to_dict(config),
      allow_val_change=True,  # of changeable keys
      dir=str(workdir) if in_workdir else None,
      reinit='create_new',  # A notebook may have a run of its own.
      settings=wandb.Settings(silent=True, console='off', finish_timeout=_FINISH_SECONDS),
    )
    try:
      try:
        self._run = wandb.init(**arguments)
      except wandb.errors.CommError as error:
        reason = ' '.join(str(error).split())[:300]
        logging.warning(f'Weights & Biases cannot be used ({reason}). The run is recorded offline.')
        # The process of wandb still holds the id of the run, and `wandb.teardown`, which frees it,
        # would break other runs of this process. The record therefore has an id of its own.
        arguments['id'] = uuid.uuid4().hex
        self._run = wandb.init(**arguments, mode='offline')
      # Charts have the training step as their axis. The own counter of wandb must increase, and a
      # job that resumes repeats the steps after its checkpoint.
      self._run.define_metric('*', step_metric='step')
    except Exception as error:
      reason = ' '.join(str(error).split()).rstrip('.')
      raise ConfigError(f'config.tracker.kind=wandb failed: {reason}; or {remedy}') from error
    offline = f'upload the run with wandb sync --id {layout.run_id(workdir)} {self._run.sync_dir}'
    logging.info(f'Weights & Biases: {offline if self._run.offline else self._run.url}')
    self._image = wandb.Image

  def rewind(self, step: int) -> None:
    """Repeated steps are logged again."""

  def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
    self._run.log({'step': step} | {f'{split}/{name}': value for name, value in scalars.items()})

  def write_image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W C']) -> None:
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    self._run.log({'step': step, name: self._image(Image.fromarray(pixels))})

  def flush(self) -> None:
    """A process of wandb uploads metrics, or writes them to its file, every 15 seconds."""

  def close(self, exit_code: int) -> None:
    if exit_code == EXIT_CODE_PREEMPTED:
      self._run.mark_preempting()
    self._run.finish(exit_code=exit_code)


TRACKERS = {'wandb': WandbRun}  # by the choices of config.tracker.kind, without none
