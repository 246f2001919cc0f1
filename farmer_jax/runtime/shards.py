"""Samples on disk: npz files of a thousand images each, written so that a killed job can go on."""

import time
import zipfile

import numpy as np

from farmer_jax.runtime import console, workdir

SHARD_SIZE = 1000
_SECONDS_BETWEEN_WRITES = 30.0

# Names in a file. Evaluators look for the images under arr_0 and labels under arr_1.
_NAMES = {'images': 'arr_0', 'labels': 'arr_1', 'finite': 'finite', 'residual': 'residual'}


class Shards:
  """The samples 0, 1, … of one kind, in FOLDER/00000.npz, 00001.npz, …

  Images uint8 [n, H, W, C] (`arr_0`), labels int32 [n] (`arr_1`), and whether each was finite and
  the residual of its inverse.
  """

  def __init__(self, folder):
    """Opens or makes `folder` (an `epath.Path`) and finds out what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    self._last_write = time.monotonic()
    self._full, self._tail = 0, None
    while (shard := self._read(self._full)) is not None:
      if len(shard['finite']) < SHARD_SIZE:
        self._tail = shard
        break
      self._full += 1

  def __len__(self):
    """Samples there, without gaps."""
    return self._full * SHARD_SIZE + (len(self._tail['finite']) if self._tail else 0)

  def append(self, **arrays):
    """Adds samples: images, labels, finite, residual. They reach the disk within half a minute, at
    the end of a shard, or with `flush`."""
    while len(arrays['finite']):
      tail = self._tail or {name: array[:0] for name, array in arrays.items()}
      room = SHARD_SIZE - len(tail['finite'])
      self._tail = {name: np.concatenate([tail[name], arrays[name][:room]]) for name in _NAMES}
      arrays = {name: array[room:] for name, array in arrays.items()}
      if len(self._tail['finite']) == SHARD_SIZE:
        self.flush()
        self._full, self._tail = self._full + 1, None
    if time.monotonic() - self._last_write > _SECONDS_BETWEEN_WRITES:
      self.flush()

  def flush(self):
    """Writes what is not on disk yet."""
    if self._tail:
      with workdir.replacing(self._file(self._full)) as temporary, temporary.open('wb') as file:
        np.savez(file, **{_NAMES[name]: array for name, array in self._tail.items()})
    self._last_write = time.monotonic()

  def read(self, name, count):
    """The first `count` entries of an array: images, labels, finite or residual."""
    parts = [self._load(i, name) for i in range(min(self._full, -(-count // SHARD_SIZE)))]
    if self._tail:
      parts.append(self._tail[name])
    return np.concatenate(parts)[:count]

  def _file(self, index):
    return self._folder / f'{index:05d}.npz'

  def _load(self, index, name):
    with self._file(index).open('rb') as file, np.load(file) as arrays:
      return arrays[_NAMES[name]]

  def _read(self, index):
    """A shard, its images only if it is not full; None if it is missing or damaged."""
    if not self._file(index).exists():
      return None
    try:
      finite = self._load(index, 'finite')
      names = ('finite',) if len(finite) == SHARD_SIZE else _NAMES
      return {name: self._load(index, name) for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      console.say(
        f'{self._file(index)} is damaged; its samples, and those after it, are drawn again.'
      )
      return None
