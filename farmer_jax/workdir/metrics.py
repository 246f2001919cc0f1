"""Metrics of a run: WORKDIR/metrics.jsonl and TensorBoard events."""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from typing import IO, Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from farmer_jax.workdir import layout

_FILE = 'metrics.jsonl'


class MetricWriter:
  """Appends metrics to metrics.jsonl, one JSON object per line, and to TensorBoard events.

  Only process 0 writes. A run that resumes from the checkpoint of `first_step` removes the metrics
  of later steps, so that each step occurs once.
  """

  def __init__(self, workdir: epath.Path, first_step: int):
    self._file: IO[str] | None = None
    self._events: Any = None
    self._has_failed = False
    if jax.process_index():
      return
    path = workdir / _FILE
    if path.exists():
      lines = [line for line in path.read_text().splitlines() if _step(line) <= first_step]
      layout.write_atomically(path, ''.join(line + '\n' for line in lines))
    self._file = path.open('a')
    self._events = _tensorboard_writer(workdir)

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Writes scalars of `split` ('train' or 'valid') at `step`."""
    if self._file is None:
      return
    scalars = {name: float(value) for name, value in values.items()}
    # JSON has no NaN and no infinity.
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    record = {'step': step, 'split': split, 'time': round(time.time(), 3), **finite}
    self._append(json.dumps(record, allow_nan=False) + '\n')
    if self._events:
      self._events.write_scalars(step, {f'{split}/{name}': v for name, v in scalars.items()})

  def write_image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W C']) -> None:
    if self._events:
      self._events.write_images(step, {name: image[None]})

  def close(self) -> None:
    if self._file:
      self._append('')
      with contextlib.suppress(OSError):
        self._file.close()
    if self._events:
      self._events.close()

  def _append(self, text: str) -> None:
    """Writes text. A full disk causes one warning and does not stop the training.

    The file's buffer holds text that could not be written, and the next call writes this text.
    """
    assert self._file is not None
    try:
      self._file.write(text)
      self._file.flush()
      self._has_failed = False
    except OSError as error:
      if not self._has_failed:
        logging.warning(f'Metrics cannot be written ({error.strerror}). Training continues.')
      self._has_failed = True


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Returns the records in metrics.jsonl. Values that were not finite are NaN."""
  path = layout.absolute(workdir) / _FILE
  records = [json.loads(line) for line in path.read_text().splitlines() if _step(line) >= 0]
  return [{k: math.nan if v is None else v for k, v in record.items()} for record in records]


def _step(line: str) -> float:
  """Returns the step of a line, or NaN for a line that a crash truncated."""
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return math.nan


def _tensorboard_writer(workdir: epath.Path) -> Any:
  """Returns CLU's writer, or None if CLU or TensorFlow is not installed."""
  try:
    from clu import metric_writers
  except ImportError as error:
    logging.info(f'TensorBoard events are not written ({error}). Metrics are in metrics.jsonl.')
    return None
  return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))
