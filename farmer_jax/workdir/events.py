"""TensorBoard events of a run: WORKDIR/events.out.tfevents.*, written by CLU and TensorFlow."""

import tempfile
import time
from collections.abc import Mapping
from logging import LogRecord
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from farmer_jax.workdir import layout, stores


class EventWriter:
  """Writes scalars and images for TensorBoard, if CLU and TensorFlow are installed.

  TensorFlow has another client for object stores. Their event files are written locally and copied
  once a minute.
  """

  name = 'TensorBoard events'
  _SECONDS = 60.0

  def __init__(self, workdir: epath.Path):
    self._workdir, self._next_copy = workdir, time.monotonic() + self._SECONDS
    is_stored = stores.is_store(workdir)
    self._folder = tempfile.TemporaryDirectory(prefix='events-') if is_stored else None
    self._events: Any = None

  def rewind(self, step: int) -> None:
    """TensorBoard expects that each file has increasing steps."""
    if self._events:
      self._events.close()
    self._events = _clu_writer(self._folder.name if self._folder else self._workdir)

  def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
    if self._events:
      self._events.write_scalars(step, {f'{split}/{name}': v for name, v in scalars.items()})
      if time.monotonic() > self._next_copy:
        self.flush()

  def write_image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W C']) -> None:
    if self._events:
      self._events.write_images(step, {name: image[None]})

  def flush(self) -> None:
    """Copies the event files of this process to an object store."""
    if self._events and self._folder:
      self._next_copy = time.monotonic() + self._SECONDS
      self._events.flush()
      with layout.optional_write(self.name):
        stores.copy_files(self._folder.name, self._workdir)

  def close(self, exit_code: int) -> None:
    self.flush()
    if self._events:
      self._events.close()
    if self._folder:
      self._folder.cleanup()


def _clu_writer(folder: epath.PathLike) -> Any:
  """Returns CLU's writer, or None if CLU or TensorFlow is not installed."""
  try:
    from clu import metric_writers
  except ImportError as error:
    logging.info(f'TensorBoard events are not written ({error}). Metrics are in metrics.jsonl.')
    return None
  # The thread of the writer logs the traceback of an exception that `MetricWriter` reports.
  logging.get_absl_logger().addFilter(_is_not_from_the_thread)
  return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))


def _is_not_from_the_thread(record: LogRecord) -> bool:
  return not record.pathname.endswith('asynclib.py')
