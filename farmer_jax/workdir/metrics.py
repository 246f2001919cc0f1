"""Metrics of a run: WORKDIR/metrics.jsonl, TensorBoard events, and a tracker."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Mapping
from typing import IO, Any, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from farmer_jax import errors
from farmer_jax.distributed import preemption
from farmer_jax.workdir import events, layout, stores

_FILE = 'metrics.jsonl'


class Writer(Protocol):
  """A destination of metrics in process 0. `rewind` is called first."""

  name: str  # what is written, for messages; a plural

  def rewind(self, step: int) -> None:
    """The run starts at the checkpoint of `step`, or returns to it: later metrics are obsolete."""

  def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None: ...

  def write_image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W C']) -> None: ...

  def flush(self) -> None:
    """Called before a checkpoint is saved: a run that resumes from it has all earlier metrics."""

  def close(self, exit_code: int) -> None:
    """The process ends with `exit_code`, or would if the run was not started from Python."""


class MetricWriter:
  """Context in which metrics are written to metrics.jsonl and to further writers.

  Only process 0 writes. Training does not need the further writers: after an exception of one of
  them, a warning is logged, and nothing more is written to it.
  """

  def __init__(self, workdir: epath.Path):
    self._lines: _LineWriter | None = None
    self._others: list[Writer] = []
    if not jax.process_index():
      self._lines = _LineWriter(workdir / _FILE)
      self._others.append(events.EventWriter(workdir))

  def add(self, writer: Writer) -> None:
    self._others.append(writer)

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
    preempted = isinstance(error, preemption.Preempted)
    self._call('close', errors.EXIT_CODE_PREEMPTED if preempted else int(error is not None))

  def rewind(self, step: int) -> None:
    """Starts after the checkpoint of `step`. Removes later metrics, so that no step occurs twice.

    A tracker cannot remove metrics. It gets the metrics of a repeated step again.
    """
    self._call('rewind', step)

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Writes scalars of `split` ('train', 'valid' or 'fidelity') at `step`."""
    self._call('write', step, split, {name: float(value) for name, value in values.items()})

  def write_image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W C']) -> None:
    self._call('write_image', step, name, image)

  def flush(self) -> None:
    """Called before a checkpoint is saved. See `Writer.flush`."""
    self._call('flush')

  def _call(self, method: str, *args: Any) -> None:
    if self._lines:
      getattr(self._lines, method)(*args)
    for writer in tuple(self._others):
      try:
        getattr(writer, method)(*args)
      except Exception as error:  # TensorFlow and trackers raise their own types.
        self._others.remove(writer)
        logging.warning(
          f'{writer.name} are no longer written ({_reason(error)}). Training continues.'
        )


def _reason(error: Exception) -> str:
  """Describes an error of a library in one line."""
  text = ' '.join(str(error.__cause__ or error).split())  # CLU wraps the errors of TensorFlow.
  # The message of TensorFlow starts with long names. The reason of the system is at its end.
  known = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO))
  return next((system for system in known if system in text), text[:200])


class _LineWriter:
  """Appends scalars to metrics.jsonl, one JSON object per line.

  A disk that is full causes one warning. Lines that could not be written are written later.
  """

  name = _FILE

  def __init__(self, path: epath.Path):
    self._path = path
    self._file: _AppendedFile | None = None

  def rewind(self, step: int) -> None:
    if self._file:
      self._file.close()
    before = self._path.read_text() if self._path.exists() else ''
    text = ''.join(f'{line}\n' for line in before.splitlines() if _step(line) <= step)
    if text != before:
      layout.write_text(self._path, text)
    is_stored = stores.is_store(self._path)
    self._file = _StoredFile(self._path, text) if is_stored else _AppendedFile(self._path)

  def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
    assert self._file
    # JSON has no NaN and no infinity.
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    record = {'step': step, 'split': split, 'time': round(time.time(), 3), **finite}
    self._file.append(json.dumps(record, allow_nan=False) + '\n')

  def write_image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W C']) -> None:
    """Images are files of their own."""

  def flush(self) -> None:
    if self._file:
      self._file.flush()

  def close(self, exit_code: int) -> None:
    if self._file:
      self._file.close()


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
        reason = stores.describe(error)
        logging.warning(f'Metrics cannot be written ({reason}). Training continues.')
      self._has_failed = True

  def flush(self) -> None:
    """Writes all text."""
    self.append('')

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

  def flush(self) -> None:
    self._next_write = -math.inf
    self.append('')

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
