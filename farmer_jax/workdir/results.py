"""Results on disk, one an image: npz files of a thousand each, written so that a killed job can go
on."""

import time
import zipfile

import numpy as np

from farmer_jax import terminal
from farmer_jax.workdir import layout

SHARD_SIZE = 1000
_SECONDS_BETWEEN_WRITES = 30.0


class Shards:
  """Rows 0, 1, … of several arrays, in FOLDER/00000.npz, 00001.npz, …"""

  def __init__(self, folder, names, first=0):
    """Opens or makes `folder` (an `epath.Path`) and finds out what is there.

    Args:
      folder: where the files are.
      names: of the arrays, as a dict to their names in a file. Rows are counted by the last one,
        which should be small.
      first: number of the first file; rows count from there. Processes that share a folder begin
        at different ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    self._folder, self.names, self._first = folder, names, first
    self._counted = list(names)[-1]
    self._last_write = time.monotonic()
    self._full, self._tail, self._changed = 0, None, False
    while (shard := self._read(self._full)) is not None:
      if len(shard[self._counted]) < SHARD_SIZE:
        self._tail = shard
        break
      self._full += 1

  def __len__(self):
    """Rows there, without gaps."""
    return self._full * SHARD_SIZE + (len(self._tail[self._counted]) if self._tail else 0)

  def append(self, **arrays):
    """Adds rows. They reach the disk within half a minute, when a shard is full, or with
    `flush`."""
    while len(arrays[self._counted]):
      self._changed = True
      tail = self._tail or {name: array[:0] for name, array in arrays.items()}
      room = SHARD_SIZE - len(tail[self._counted])
      self._tail = {n: np.concatenate([tail[n], arrays[n][:room]]) for n in self.names}
      arrays = {name: array[room:] for name, array in arrays.items()}
      if len(self._tail[self._counted]) == SHARD_SIZE:
        self.flush()
        self._full, self._tail = self._full + 1, None
    if time.monotonic() - self._last_write > _SECONDS_BETWEEN_WRITES:
      self.flush()

  def flush(self):
    """Writes what is not on disk yet."""
    if self._tail and self._changed:  # What is there may be another process's.
      with layout.replacing(self._file(self._full)) as temporary, temporary.open('wb') as file:
        np.savez(file, **{self.names[name]: array for name, array in self._tail.items()})
      self._changed = False
    self._last_write = time.monotonic()

  def read(self, name, end, start=0):
    """The rows from `start` to `end` of an array."""
    first, last = start // SHARD_SIZE, -(-end // SHARD_SIZE)
    parts = [self._load(i, name) for i in range(first, min(self._full, last))]
    if self._tail and last > self._full:
      parts.append(self._tail[name])
    rows = np.concatenate(parts)[start - first * SHARD_SIZE :][: end - start]
    if len(rows) < end - start:
      raise RuntimeError(
        f'{self._folder} has too few rows: another process has not written its own'
      )
    return rows

  def _file(self, index):
    return self._folder / f'{self._first + index:05d}.npz'

  def _load(self, index, name):
    with self._file(index).open('rb') as file, np.load(file) as arrays:
      return arrays[self.names[name]]

  def _read(self, index):
    """A shard, of a full one what rows are counted by alone; None if it is missing or damaged."""
    if not self._file(index).exists():
      return None
    try:
      counted = self._load(index, self._counted)
      if len(counted) == SHARD_SIZE:
        return {self._counted: counted}
      return {name: self._load(index, name) for name in self.names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      terminal.say(
        f'{self._file(index)} is damaged; what it held, and what follows, is made again.'
      )
      return None
