"""Metrics on disk: `metrics.jsonl`, and TensorBoard events beside it."""

import contextlib
import json
import math
import time
from typing import Any

import jax

from farmer_jax import terminal
from farmer_jax.workdir import layout


class MetricWriter:
  """Appends metrics to WORKDIR/metrics.jsonl, one JSON object a line, and to TensorBoard events. Of
  several processes the first alone does.

  A run that goes on from a checkpoint drops what was logged after it, so that each step stands
  there once.
  """

  def __init__(self, workdir, first_step):
    self._file: Any = None
    self._events = None
    self._failing = False
    if jax.process_index():
      return
    path = workdir / 'metrics.jsonl'
    if path.exists():
      lines = [line for line in path.read_text().splitlines() if _step(line) <= first_step]
      layout.write_atomically(path, ''.join(line + '\n' for line in lines))
    self._file = path.open('a')
    self._events = _tensorboard_writer(workdir)

  def write(self, step, split, values):
    """Writes scalars of `split` ('train' or 'valid') at `step`."""
    values = {name: float(value) for name, value in values.items()}
    # JSON has no numbers that are not finite.
    known = {name: value if math.isfinite(value) else None for name, value in values.items()}
    record = {'step': step, 'split': split, 'time': round(time.time(), 3), **known}
    if not self._file:
      return
    self._keep(json.dumps(record, allow_nan=False) + '\n')
    if self._events:
      self._events.write_scalars(step, {f'{split}/{name}': v for name, v in values.items()})

  def _keep(self, line):
    """Writes to the file. A full disk is reported, once, and ends nothing: as much as the file's
    buffer has room for is written as soon as that is possible."""
    try:
      self._file.write(line)
      self._file.flush()
      self._failing = False
    except OSError as error:
      if not self._failing:
        terminal.say(f'WARNING: metrics cannot be written at the moment ({error.strerror}).')
      self._failing = True

  def write_image(self, step, name, image):  # uint8 [H, W, C]
    """Shows a picture in TensorBoard."""
    if self._events:
      self._events.write_images(step, {name: image[None]})

  def close(self):
    """Flushes everything to disk."""
    if self._file:
      self._keep('')
      with contextlib.suppress(OSError):
        self._file.close()
    if self._events:
      self._events.close()


def read(workdir):
  """The records of a run's metrics.jsonl, a list of dicts; what was not finite is nan."""
  path = layout.absolute(workdir) / 'metrics.jsonl'
  records = [json.loads(line) for line in path.read_text().splitlines() if _step(line) >= 0]
  return [{k: math.nan if v is None else v for k, v in record.items()} for record in records]


def _step(line):
  """The step of a line; a line cut short by a crash counts as none."""
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return float('nan')


def _tensorboard_writer(workdir):
  """CLU's writer, or None on machines without TensorFlow."""
  try:
    from clu import metric_writers
  except ImportError as error:
    terminal.say(f'No TensorBoard events, only metrics.jsonl: {error}')
    return None
  return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))
