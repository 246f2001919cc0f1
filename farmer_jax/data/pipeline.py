"""Batches of examples: an endless shuffled stream for training, one ordered pass for validation.

Grain shuffles and batches *indices*; a source then hands out a whole batch at once. What a batch
holds depends on its number, the seed and the source alone: not on threads, workers or processes.
"""

import grain
import numpy as np

from farmer_jax.config import ConfigError
from farmer_jax.data import base


def train_iterator(source, data, batch_size, seed, process_index=0, process_count=1):
  """An endless iterator over shuffled batches, which can be checkpointed.

  Every epoch is a permutation of the source, and different from the others. The last batch of an
  epoch is filled up from the next one: no example is dropped, and a batch may exceed the source.

  Args:
    source: base.Source.
    data: config.Data; its `threads`, `prefetch` and `workers` are used.
    batch_size: images a batch, over all processes.
    seed: int, of the order.
    process_index: number of this process, which gets one of `process_count` consecutive parts of
      each batch.
    process_count: number of processes.

  Returns:
    TrainIterator over `{'image': uint8 [b, H, W, C], 'label': int32 [b]}`, where b is
    batch_size / process_count.

  Raises:
    ConfigError: the batch cannot be divided among the processes.
  """
  _check_batch(batch_size, process_count, 'train.batch_size')
  part = _part(batch_size, process_index, process_count)
  batches = (
    grain.MapDataset.range(len(source))
    .seed(seed % 2**32)
    .shuffle()
    .repeat(None)
    .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
    .map(lambda indices: source.gather(indices[part]))
  )
  identity = {'examples': len(source), 'batch_size': batch_size, 'seed': seed}
  # Gathering from an array is faster than a worker can send it, and each would need a copy of it.
  workers = 0 if isinstance(source, base.ArraySource) else data.workers
  return TrainIterator(batches, _read_options(data.threads, data.prefetch), workers, identity)


class TrainIterator(grain.DatasetIterator):
  """Iterates over a Grain data set of batches; its state is the number of batches taken.

  The states of Grain's own iterators depend on the number of workers, and are accepted for any
  other data. This one resumes with other threads and workers, and refuses what is not its own.
  """

  def __init__(self, batches, read_options, workers, identity):
    super().__init__()
    self._batches = batches
    self._read_options = read_options
    self._workers = workers
    self._identity = identity
    self._position = 0
    self._stream = self._open()

  def _open(self):
    """Grain's iterator over the batches from the current position on."""
    remaining = self._batches[self._position :].to_iter_dataset(self._read_options)
    if self._workers:
      remaining = remaining.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
    return iter(remaining)

  def __next__(self):
    batch = next(self._stream)
    self._position += 1
    return batch

  def get_state(self):
    """A dict of ints that can be written as JSON."""
    return {'batches': self._position, **self._identity}

  def set_state(self, state):
    """Continues after the batches taken when `state` was gotten.

    Raises:
      ConfigError: the state is that of another stream.
    """
    for name, value in self._identity.items():
      if state.get(name) != value:
        raise ConfigError(
          f'cannot resume the training data: {name} is {value}, and was {state.get(name)} when the'
          ' checkpoint was written; restore what it was, or train into another --workdir'
        )
    self._stream.close()
    self._position = state['batches']
    self._stream = self._open()

  def start_prefetch(self):
    """Starts to read batches ahead, before the first is asked for."""
    self._stream.start_prefetch()

  def close(self):
    """Stops threads and workers; the iterator is of no more use."""
    if not self._closed:
      self._stream.close()
    super().close()


def valid_batches(
  source, batch_size, limit=None, process_index=0, process_count=1, threads=2, prefetch=2, start=0
):
  """Yields every example once, in order, in batches of one size.

  The last batch is filled up with copies of its last example, which `mask` tells apart.

  Args:
    source: base.Source.
    batch_size: images a batch, over all processes.
    limit: number of examples to stop at, or None.
    process_index: number of this process, which gets one of `process_count` consecutive parts of
      each batch; all processes get equally many batches.
    process_count: number of processes.
    threads: threads that read images.
    prefetch: batches read ahead.
    start: example to start at.

  Yields:
    `{'image': uint8 [b, H, W, C], 'label': int32 [b], 'index': int32 [b], 'mask': bool [b]}`, where
    b is batch_size / process_count, and index the place of the example in the source. The mask is
    True for the examples proper.

  Raises:
    ConfigError: the batch cannot be divided among the processes.
  """
  _check_batch(batch_size, process_count, 'train.valid_batch_size')
  count = len(source) if limit is None else min(limit, len(source))
  part = _part(batch_size, process_index, process_count)

  def gather(batch):
    indices = start + np.arange(batch * batch_size, (batch + 1) * batch_size)[part]
    real = np.minimum(indices, count - 1)
    return {**source.gather(real), 'index': real.astype(np.int32), 'mask': indices < count}

  batches = grain.MapDataset.range(-(-max(count - start, 0) // batch_size)).map(gather)
  yield from batches.to_iter_dataset(_read_options(threads, prefetch))


def _read_options(threads, prefetch):
  return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)


def _part(batch_size, process_index, process_count):
  """The part of a batch that a process reads."""
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


def _check_batch(batch_size, process_count, name):
  """Raises ConfigError for a batch that is empty or cannot be divided among the processes."""
  if batch_size < 1 or batch_size % process_count:
    raise ConfigError(
      f'--config.{name} must be a positive multiple of the number of processes, {process_count},'
      f' not {batch_size}'
    )
