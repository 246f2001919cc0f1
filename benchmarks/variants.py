"""Trains variants of a configuration, for searches and ablations that can be interrupted."""

import functools
import math
import operator
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from farmer_jax import config as config_lib
from farmer_jax.errors import DivergenceError
from farmer_jax.jobs import pretrain
from farmer_jax.workdir import metrics


def set_keys(values: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> None:
  """Sets keys such as 'train.optimizer.b2'.

  A string '×2' multiplies the old value, '+1' adds to it. A function computes the new value from
  all old values.
  """
  for key, change in changes.items():
    *sections, name = key.split('.')
    section = functools.reduce(operator.getitem, sections, values)
    if callable(change):
      change = change(values)
    elif isinstance(change, str) and change[0] in '×+':
      value, number = section[name], float(change[1:])
      change = type(value)(value * number if change[0] == '×' else value + number)
    section[name] = change


def validate(config: config_lib.Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains, and returns the last held-out metrics, or {} if training diverged.

  A finished run is read, and an interrupted run is resumed.

  Raises:
    ConfigError: the configuration is invalid.
  """
  config_lib.check(config)
  logging.info(f'{workdir.name} ...')

  def held_out() -> list[dict[str, Any]]:
    steps, file = config.train.steps, workdir / 'metrics.jsonl'
    # Validation ends before the last checkpoint is written.
    is_saved = not config.train.checkpoint_every or (workdir / 'checkpoints' / str(steps)).exists()
    rows = metrics.read(workdir) if file.exists() and is_saved else ()
    return [row for row in rows if row['split'] == 'valid' and row['step'] == steps]

  try:
    if not held_out():
      pretrain.run(config, workdir)
  except DivergenceError as error:
    logging.info(f'{workdir.name}: {error}')
    return {}
  return held_out()[-1]


def mean_and_error(values: Sequence[float], digits: int = 3) -> str:
  """Returns the mean and, of several values, its standard error."""
  text = f'{statistics.mean(values):.{digits}f}'
  if len(values) > 1 and all(map(math.isfinite, values)):
    text += f' ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}'
  return text
