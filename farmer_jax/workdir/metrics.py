"""Metrics of a run: WORKDIR/metrics.jsonl and TensorBoard events."""

import contextlib
import errno
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from logging import LogRecord
from typing import IO, Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from farmer_jax.workdir import layout, stores

_FILE = 'metrics.jsonl'


class MetricWriter:
  """Appends metrics to metrics.jsonl, one JSON object per line, and to TensorBoard events.

  Only process 0 writes. A run that resumes from the checkpoint of `first_step` removes the metrics
  of later steps, so that each step occurs once. A disk that is full causes one warning. Lines that
  could not be written are written later.
  """

  def __init__(self, workdir: epath.Path, first_step: int):
    self._workdir = workdir
    self._file: _AppendedFile | None = None
    self._folder: tempfile.TemporaryDirectory[str] | None = None
    self._events: Any = None
    if jax.process_index():
      return
    path = workdir / _FILE
    before = path.read_text() if path.exists() else ''
    text = ''.join(f'{line}\n' for line in before.splitlines() if _step(line) <= first_step)
    if text != before:
      layout.write_text(path, text)
    self._file = _StoredFile(path, text) if stores.is_store(path) else _AppendedFile(path)
    # TensorFlow has another client for object stores. Event files are written locally and copied.
    if stores.is_store(path):
      self._folder = tempfile.TemporaryDirectory(prefix='events-')
    self._events = _tensorboard_writer(self._folder.name if self._folder else workdir)

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Writes scalars of `split` ('train', 'valid' or 'fidelity') at `step`."""
    if self._file is None:
      return
    scalars = {name: float(value) for name, value in values.items()}
    # JSON has no NaN and no infinity.
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    record = {'step': step, 'split': split, 'time': round(time.time(), 3), **finite}
    has_written = self._file.append(json.dumps(record, allow_nan=False) + '\n')
    self._write_events(
      'write_scalars', step, {f'{split}/{name}': value for name, value in scalars.items()}
    )
    if has_written and self._folder:
      self._copy_events(self._folder.name)

  def flush(self) -> None:
    """Writes all metrics to an object store. Called before a checkpoint is saved.

    A run that is killed then has all metrics up to the checkpoint from which it resumes.
    """
    if self._file and self._file.flush() and self._folder:
      self._copy_events(self._folder.name)

  def write_image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W C']) -> None:
    self._write_events('write_images', step, {name: image[None]})

  def close(self) -> None:
    if self._file:
      self._file.close()
    self._write_events('close')
    if self._folder:
      self._copy_events(self._folder.name)
      self._folder.cleanup()

  def _copy_events(self, folder: str) -> None:
    """Copies the event files of this process to an object store."""
    self._write_events('flush')
    with layout.optional_write('TensorBoard events'):
      stores.copy_files(folder, self._workdir)

  def _write_events(self, method: str, *args: Any) -> None:
    """Calls a method of CLU's writer. After an exception, no more events are written."""
    if self._events is None:
      return
    try:
      getattr(self._events, method)(*args)
    except Exception as error:  # TensorFlow raises its own types, and CLU wraps them.
      self._events = None
      text = ' '.join(str(error.__cause__ or error).split())
      # The message of TensorFlow starts with long names. The reason of the system is at its end.
      known = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO))
      reason = next((system for system in known if system in text), text[:200])
      logging.warning(f'TensorBoard events are no longer written ({reason}). Training continues.')


class _AppendedFile:
  """A file to which lines are appended. Keeps lines that could not be written."""

  def __init__(self, path: epath.Path) -> None:
    self._pending, self._has_failed = b'', False
    # Without a buffer, the number of bytes that a full disk accepted is known.
    self._file: IO[bytes] | None = open(path, 'ab', buffering=0)  # noqa: SIM115

  def append(self, text: str) -> bool:
    """Adds text. Returns whether all text is in the file."""
    self._pending += text.encode()
    try:
      self._write()
      self._has_failed = False
    except OSError as error:
      if not self._has_failed:
        reason = stores.describe(error)
        logging.warning(f'Metrics cannot be written ({reason}). Training continues.')
      self._has_failed = True
    return not self._pending

  def flush(self) -> bool:
    """Writes all text. Returns whether all text is in the file."""
    return self.append('')

  def close(self) -> None:
    self.flush()
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
    self._pending, self._has_failed, self._next_write = b'', False, time.monotonic() + self._SECONDS

  def flush(self) -> bool:
    self._next_write = -math.inf
    return self.append('')

  def _write(self) -> None:
    if self._pending and time.monotonic() > self._next_write:
      self._next_write = time.monotonic() + self._SECONDS
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


def _tensorboard_writer(folder: epath.PathLike) -> Any:
  """Returns CLU's writer, or None if CLU or TensorFlow is not installed."""
  try:
    from clu import metric_writers
  except ImportError as error:
    logging.info(f'TensorBoard events are not written ({error}). Metrics are in metrics.jsonl.')
    return None
  # The thread of the writer logs the traceback of an exception that `_write_events` reports.
  logging.get_absl_logger().addFilter(_is_not_from_the_thread)
  return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))


def _is_not_from_the_thread(record: LogRecord) -> bool:
  return not record.pathname.endswith('asynclib.py')
