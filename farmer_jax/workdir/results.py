"""Results with one row per image, in npz files of 1,000 rows. A killed job can resume."""

import time
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
from absl import logging
from etils import epath

from farmer_jax.errors import ProcessError
from farmer_jax.workdir import layout

ROWS_PER_FILE = 1000
_SECONDS_BETWEEN_WRITES = 30.0


class ResultFiles:
  """Rows 0, 1, … of several arrays, in FOLDER/00000.npz, FOLDER/00001.npz, …"""

  def __init__(self, folder: epath.Path, names: Mapping[str, str], first_file: int = 0):
    """Opens or creates the folder, and counts the stored rows.

    `names` maps the name of each array to its name in the files. Rows are counted in the last,
    small array. `first_file`, which has row 0, differs between processes that share a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    self._folder, self.names, self._first_shard = folder, names, first_file
    self._counted = list(names)[-1]
    self._last_write = time.monotonic()
    self._num_full = 0  # files with ROWS_PER_FILE rows
    self._tail: dict[str, np.ndarray] | None = None  # rows after the last full file
    self._has_unsaved_rows = False
    while (shard := self._read_shard(self._num_full)) is not None:
      if len(shard[self._counted]) < ROWS_PER_FILE:
        self._tail = shard
        break
      self._num_full += 1

  def __len__(self) -> int:
    return self._num_full * ROWS_PER_FILE + (len(self._tail[self._counted]) if self._tail else 0)

  def append(self, **arrays: np.ndarray) -> None:
    """Adds rows. They are written when a file is full, every 30 seconds, or by `flush`."""
    while len(arrays[self._counted]):
      self._has_unsaved_rows = True
      tail = self._tail or {name: array[:0] for name, array in arrays.items()}
      room = ROWS_PER_FILE - len(tail[self._counted])
      self._tail = {n: np.concatenate([tail[n], arrays[n][:room]]) for n in self.names}
      arrays = {name: array[room:] for name, array in arrays.items()}
      if len(self._tail[self._counted]) == ROWS_PER_FILE:
        self.flush()
        self._num_full, self._tail = self._num_full + 1, None
    if time.monotonic() - self._last_write > _SECONDS_BETWEEN_WRITES:
      self.flush()

  def flush(self) -> None:
    """Writes all rows that are not on disk."""
    if self._tail and self._has_unsaved_rows:  # An unchanged tail may belong to another process.
      arrays = {self.names[name]: array for name, array in self._tail.items()}
      layout.write_npz(self._file(self._num_full), arrays)
      self._has_unsaved_rows = False
    self._last_write = time.monotonic()

  def read(self, name: str, end: int, start: int = 0) -> np.ndarray:
    """Returns rows `start` to `end` - 1. Raises `ProcessError` if rows of a process are missing."""
    first, last = start // ROWS_PER_FILE, -(-end // ROWS_PER_FILE)
    parts = [self._load(i, name) for i in range(first, min(self._num_full, last))]
    if self._tail and last > self._num_full:
      parts.append(self._tail[name])
    rows = np.concatenate(parts)[start - first * ROWS_PER_FILE :][: end - start]
    if len(rows) < end - start:
      raise ProcessError(
        f'{self._folder} lacks rows of another process; all processes must share the --workdir'
      )
    return rows

  def _file(self, index: int) -> epath.Path:
    return self._folder / f'{self._first_shard + index:05d}.npz'

  def _load(self, index: int, name: str) -> np.ndarray:
    with self._file(index).open('rb') as file, np.load(file) as arrays:
      return arrays[self.names[name]]

  def _read_shard(self, index: int) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a file (if full, only the counted array), or None if it is unusable.

    All arrays are read, so that damage is found before new rows are computed.
    """
    if not self._file(index).exists():
      return None
    try:
      arrays = {name: self._load(index, name) for name in self.names}
      is_full = len(arrays[self._counted]) == ROWS_PER_FILE
      return {self._counted: arrays[self._counted]} if is_full else arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
      problem = 'lacks an array' if isinstance(error, KeyError) else 'is corrupt'
      logging.warning(
        f'{self._file(index)} {problem}. Its rows and all later rows are computed again.'
      )
      return None
