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
  of later steps, so that each step occurs once. A disk that is full causes one warning. Lines that
  could not be written are written later.
  """

  def __init__(self, workdir: epath.Path, first_step: int):
    self._file: _AppendedFile | None = None
    self._events: Any = None
    if jax.process_index():
      return
    path = workdir / _FILE
    before = path.read_text() if path.exists() else ''
    text = ''.join(f'{line}\n' for line in before.splitlines() if _step(line) <= first_step)
    if text != before:
      layout.write_text(path, text)
    self._file = _StoredFile(path, text) if '://' in str(path) else _AppendedFile(path)
    self._events = _tensorboard_writer(workdir)

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Writes scalars of `split` ('train' or 'valid') at `step`."""
    if self._file is None:
      return
    scalars = {name: float(value) for name, value in values.items()}
    # JSON has no NaN and no infinity.
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    record = {'step': step, 'split': split, 'time': round(time.time(), 3), **finite}
    self._file.append(json.dumps(record, allow_nan=False) + '\n')
    self._write_events(
      'write_scalars', step, {f'{split}/{name}': value for name, value in scalars.items()}
    )

  def write_image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W C']) -> None:
    self._write_events('write_images', step, {name: image[None]})

  def close(self) -> None:
    if self._file:
      self._file.close()
    self._write_events('close')

  def _write_events(self, method: str, *args: Any) -> None:
    """Calls a method of CLU's writer. After an exception, no more events are written."""
    if self._events is None:
      return
    try:
      getattr(self._events, method)(*args)
    except Exception as error:  # TensorFlow raises its own types, and CLU wraps them.
      self._events = None
      reason = ' '.join(str(error.__cause__ or error).split())[:200]
      logging.warning(f'TensorBoard events are no longer written ({reason}). Training continues.')


class _AppendedFile:
  """A file to which lines are appended. Keeps lines that could not be written."""

  def __init__(self, path: epath.Path) -> None:
    self._pending, self._has_failed = b'', False
    # Without a buffer, the number of bytes that a full disk accepted is known.
    self._file: IO[bytes] | None = open(path, 'ab', buffering=0)  # noqa: SIM115

  def append(self, text: str) -> None:
    self._pending += text.encode()
    try:
      self._write()
      self._has_failed = False
    except OSError as error:
      if not self._has_failed:
        reason = error.strerror or error
        logging.warning(f'Metrics cannot be written ({reason}). Training continues.')
      self._has_failed = True

  def close(self) -> None:
    self.append('')
    if self._file:
      with contextlib.suppress(OSError):
        self._file.close()

  def _write(self) -> None:
    assert self._file is not None
    while self._pending:
      self._pending = self._pending[self._file.write(self._pending) :]


class _StoredFile(_AppendedFile):
  """A file in an object store, which cannot append. It is written again once a minute."""

  _SECONDS = 60.0

  def __init__(self, path: epath.Path, text: str) -> None:
    self._path, self._content, self._file = path, text.encode(), None
    self._pending, self._has_failed, self._written = b'', False, time.monotonic()

  def close(self) -> None:
    self._written = -math.inf
    super().close()

  def _write(self) -> None:
    if self._pending and time.monotonic() - self._written > self._SECONDS:
      self._written = time.monotonic()
      self._path.write_bytes(self._content + self._pending)
      self._content, self._pending = self._content + self._pending, b''


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
