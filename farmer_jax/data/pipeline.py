"""Batches: an endless shuffled stream for training, and one ordered pass for evaluation.

Grain shuffles and batches indices. A source then reads all examples of a batch in one call. The
examples of a batch depend only on the index of the batch, the order, the seed and the source. They
do not depend on threads, workers or processes.

The state of Grain's own iterators depends on the number of workers. The exception is
`grain.experimental.ElasticIterator`, but that iterator gives process p of P the examples p, p + P,
… of a batch instead of consecutive examples, and accepts a state that was saved for other data.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import logging

from farmer_jax import config
from farmer_jax.data import base, prefetching, reading
from farmer_jax.errors import ConfigError, DataError

# Number of batches that evaluation reads ahead.
_EVALUATION_PREFETCH = 2


class TrainIterator(grain.DatasetIterator):
  """An endless iterator over shuffled batches, which can be checkpointed.

  Each epoch is another permutation of the source. A batch may contain the end of one epoch and the
  start of the next: no example is dropped, and a batch may be larger than the source. Each value of
  `order` is a different shuffle order.

  Bad examples and restarts of workers are logged. The iterator raises DataError if their number
  exceeds its limit, or if waiting for a batch takes too long.
  """

  def __init__(
    self,
    source: base.Source,
    data: config.Data,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Creates the iterator without starting threads or workers.

    A batch of `batch_size` images consists of `process_count` consecutive shards. The iterator
    reads shard `process_index`.

    Raises:
      ConfigError: the batch cannot be divided among the processes.
    """
    super().__init__()
    # Grain calls `close`, which reads these attributes, even if this constructor raises.
    self._prefetcher: prefetching.Prefetcher[reading.ReadResult] | None = None
    self._is_closed = False
    self._source, self._data = source, data
    self._share = _process_share(batch_size, process_index, process_count, 'train.batch_size')
    # `set_state` accepts only a state with the same values.
    self._identity = {'examples': len(source), 'batch_size': batch_size, 'seed': seed}
    self._position = self.order = self._largest_order = self._restarts = 0
    self._bad = reading.BadExampleCounter(data.max_bad_examples, 'training')

  def __next__(self) -> base.Batch:
    while True:
      try:
        batch, bad = next(self._open())
        break
      except prefetching.WorkerDiedError as error:
        self._restart(error)
    self._bad.add(bad)
    self._position += 1
    return batch

  def start_prefetch(self) -> None:
    """Starts to read ahead before the first call of `next`."""
    self._open().start()

  def close(self) -> None:
    """Stops threads and workers. The iterator cannot be used afterwards."""
    self._is_closed = True
    self._stop()
    super().close()

  def _open(self) -> prefetching.Prefetcher[reading.ReadResult]:
    if self._is_closed:
      raise ValueError('the iterator is closed')
    if self._prefetcher is None:
      batches, data = self._batches()[self._position :], self._data
      # Indexing an array is faster than receiving a batch from a worker, and each worker would need
      # a copy of the array.
      if data.workers and not isinstance(self._source, base.ArraySource):
        self._prefetcher = prefetching.WorkerPrefetcher(batches, data)
      else:
        self._prefetcher = prefetching.Prefetcher(
          batches.__getitem__, data, 'training', data.threads, data.prefetch
        )
    return self._prefetcher

  def _stop(self) -> None:
    if self._prefetcher is not None:
      self._prefetcher.close()
      self._prefetcher = None

  def _batches(self) -> grain.MapDataset:
    """Returns all batches in the current order."""
    share, seed = self._share, self._identity['seed'] % 2**64
    if self.order:
      seed = int(np.random.SeedSequence((seed, self.order)).generate_state(1)[0])
    read = functools.partial(reading.read_batch, self._source, self._data.max_bad_examples)
    return (
      grain.MapDataset.range(len(self._source))
      .seed(seed % 2**32)
      .shuffle()
      .repeat(None)
      .batch(self._identity['batch_size'], drop_remainder=True, batch_fn=np.asarray)
      .map(lambda indices: read(indices[share]))
    )

  def _restart(self, error: prefetching.WorkerDiedError) -> None:
    self._stop()
    self._restarts += 1
    limit = self._data.max_worker_restarts
    if self._restarts > limit:
      raise DataError(
        f'{error}, after {limit} restarts (--config.data.max_worker_restarts); see the log for the'
        ' cause, or set --config.data.workers=0 to read without workers'
      ) from error
    logging.warning(
      f'{error}; restarting at batch {self._position}. Restarts: {self._restarts} of at most'
      f' {limit}.'
    )

  def counts(self) -> dict[str, int]:
    """Counts the faults of this process since the start of the run."""
    return {
      'bad_examples': len(self._bad.indices),  # different examples
      'replaced_examples': self._bad.reads,  # a bad example is replaced in each epoch
      'worker_restarts': self._restarts,
    }

  def change_order(self) -> None:
    """Continues at the same position with an order that this iterator has not had before."""
    self._seek(self._position, self._largest_order + 1)

  def get_state(self) -> dict[str, Any]:
    return {
      'batches': self._position,
      'order': self.order,
      **self.counts(),
      'bad_examples': sorted(self._bad.indices),
      **self._identity,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues after the last batch that was taken before `state` was saved.

    Raises:
      ConfigError: the state was saved with another data set size, batch size or seed.
    """
    for name, value in self._identity.items():
      if state.get(name) != value:
        raise ConfigError(
          f'cannot resume the training data: {name} is {value}, but the checkpoint was written with'
          f' {state.get(name)}; restore the former value, or train into another --workdir'
        )
    self._seek(state['batches'], state.get('order', 0))
    self._bad.indices = set(state.get('bad_examples', ()))
    self._bad.reads = state.get('replaced_examples', 0)
    self._restarts = max(self._restarts, state.get('worker_restarts', 0))

  def _seek(self, position: int, order: int) -> None:
    self._stop()
    self._position, self.order = position, order
    self._largest_order = max(self._largest_order, order)


def evaluation_batches(
  source: base.Source,
  batch_size: int,
  limit: int | None = None,
  *,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  data: config.Data | None = None,
  skip_bad_examples: bool = False,
) -> Iterator[base.Batch]:
  """Yields each example from index `start` to `limit` - 1 once, in order, in batches of equal size.

  The last batch is padded with copies of the last example. See `TrainIterator` for `batch_size`,
  `process_index` and `process_count`. `data` sets the number of threads and the limits.

  Yields:
    `{'image': uint8 [B, H, W, C], 'label': int32 [B], 'index': int32 [B], 'mask': bool [B]}`, where
    B is batch_size / process_count, and `index` is the index in the source. `mask` is False for
    padding and, with `skip_bad_examples`, for examples that cannot be read.

  Raises:
    ConfigError: the batch cannot be divided among the processes.
    DataError: an example cannot be read (with `skip_bad_examples`: more than
      `data.max_bad_examples`), or waiting takes too long.
  """
  share = _process_share(batch_size, process_index, process_count, 'train.valid_batch_size')
  data = data or config.Data()
  end = len(source) if limit is None else min(limit, len(source))
  num_batches = -(-max(end - start, 0) // batch_size)

  def read(number: int) -> reading.ReadResult:
    wanted = start + number * batch_size + np.arange(batch_size)[share]
    indices = np.minimum(wanted, end - 1)
    if skip_bad_examples:
      batch, bad = reading.read_batch(source, data.max_bad_examples, indices)
    else:
      batch, bad = source.gather(indices), ()
    mask = (wanted < end) & ~np.isin(indices, [example.index for example in bad])
    return {**batch, 'index': indices.astype(np.int32), 'mask': mask}, bad

  prefetcher = prefetching.Prefetcher(
    read, data, 'validation', data.threads, _EVALUATION_PREFETCH, num_batches
  )
  counter = reading.BadExampleCounter(data.max_bad_examples, 'validation')
  with contextlib.closing(prefetcher):
    for batch, bad in prefetcher:
      counter.add(bad)
      yield batch


def _process_share(batch_size: int, process_index: int, process_count: int, key: str) -> slice:
  """Returns the part of each batch that a process reads. `batch_size` is the value of a `key`."""
  if batch_size < 1 or batch_size % process_count:
    raise ConfigError(
      f'--config.{key}={batch_size} must be a positive multiple of the number of processes,'
      f' {process_count}'
    )
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)
