"""Batches of examples: an endless shuffled stream for training, one ordered pass for validation.

Grain shuffles and batches *indices*; a source then hands out a whole batch at once. What a batch
holds depends on its number, the seed and the source alone: not on threads, workers or processes.
"""

import grain
import numpy as np
from absl import logging

from farmer_jax import config as config_lib
from farmer_jax.data import bad_examples, base, prefetching
from farmer_jax.errors import ConfigError


def train_iterator(source, data, batch_size, seed, process_index=0, process_count=1):
  """An endless iterator over shuffled batches, which can be checkpointed.

  Every epoch is a permutation of the source, and different from the others. The last batch of an
  epoch is filled up from the next one: no example is dropped, and a batch may exceed the source.

  Args:
    source: base.Source.
    data: config.Data; how to read, and what to put up with.
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
  read = bad_examples.Reader(source, data.max_bad_examples)

  def batches(order):
    return (
      grain.MapDataset.range(len(source))
      .seed(_order_seed(seed, order))
      .shuffle()
      .repeat(None)
      .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
      .map(lambda indices: read(indices[part]))
    )

  identity = {'examples': len(source), 'batch_size': batch_size, 'seed': seed}
  # Gathering from an array is faster than a worker can send it, and each would need a copy of it.
  workers = 0 if isinstance(source, base.ArraySource) else data.workers
  return TrainIterator(batches, data, workers, identity)


def _order_seed(seed, order):
  """The seed of Grain's shuffling: the user's, for the first order of the examples."""
  if not order:
    return seed % 2**32
  return int(np.random.SeedSequence((seed % 2**64, order)).generate_state(1)[0])


class TrainIterator(grain.DatasetIterator):
  """Iterates over batches; its state is the number of those taken, and what went wrong with them.

  The states of Grain's own iterators depend on the number of workers, and are accepted for any
  other data. This one resumes with other threads and workers, and refuses what is not its own.

  Examples that cannot be read are replaced and worker processes that die are started again, both up
  to a limit, and reported; waiting for a batch is reported and ends at a limit. A limit ends in a
  ConfigError. `counts` says how often.
  """

  def __init__(self, batches, data, workers, identity):
    """Starts nothing yet.

    Args:
      batches: batches(order) -> grain.MapDataset of (batch, tuple of `bad_examples.Failure`).
      data: config.Data.
      workers: number of worker processes.
      identity: dict of ints that a state must have in common with this iterator.
    """
    super().__init__()
    self._batches = batches
    self._data = data
    self._workers = workers
    self._identity = identity
    self._position = 0
    self._order = self._newest_order = 0
    self._ledger = bad_examples.Ledger(data.max_bad_examples)
    self._restarts = 0
    self._patience = prefetching.Patience(data.stall_seconds, data.stall_limit_seconds)
    self._stream = self._open()

  def _open(self):
    """A reader of the batches from the current position on."""
    remaining = self._batches(self._order)[self._position :]
    data = self._data
    if not self._workers:
      return prefetching.ReadAhead(remaining.__getitem__, data.threads, data.prefetch)
    options = _read_options(data.threads, data.prefetch)
    return prefetching.Workers(remaining, options, self._workers, data.stall_seconds)

  def __next__(self):
    self._assert_not_closed()
    while True:
      try:
        batch, failures = self._stream.take(self._patience)
        break
      except prefetching.WorkerDiedError as error:
        self._restart(error)
      except prefetching.StallError:
        self._stream.kill()
        raise
    if failures:
      self._ledger.note(failures)
    self._position += 1
    return batch

  def _restart(self, error):
    """Starts the workers again, at the same position."""
    self._restarts += 1
    self._stream.close()
    limit = self._data.max_worker_restarts
    if self._restarts > limit:
      raise ConfigError(
        f'{error}, after {limit} others (--config.data.max_worker_restarts); the log may say why,'
        ' and --config.data.workers=0 does without'
      ) from error
    logging.warning(
      'Reading training data: %s; starting again at batch %d. Restarts: %d of at most %d.',
      error,
      self._position,
      self._restarts,
      limit,
    )
    self._stream = self._open()

  @property
  def bad_examples(self):
    """Number of different examples that this process found unreadable so far."""
    return len(self._ledger.bad)

  @property
  def order(self):
    """Number of the order in which examples come; 0 before the first `change_order`."""
    return self._order

  def counts(self):
    """What went wrong so far in this process, a dict of ints.

    `bad_examples` are different examples, `replaced_examples` the times that another was read in
    the place of one, in every epoch again, and `worker_restarts` the deaths of worker processes.
    """
    return {
      'bad_examples': self.bad_examples,
      'replaced_examples': self._ledger.replaced,
      'worker_restarts': self._restarts,
    }

  def change_order(self, order=None):
    """From here on, examples come in another order; the position stays, also within an epoch.

    Args:
      order: number of that order; by default one more than the largest that this iterator has had,
        also in states that it has left since.
    """
    self._order = self._newest_order + 1 if order is None else order
    self._newest_order = max(self._newest_order, self._order)
    self._reopen()

  def get_state(self):
    """A dict of ints, and of one list of them, that can be written as JSON."""
    return {
      'batches': self._position,
      'order': self._order,
      **self.counts(),
      'bad_examples': sorted(self._ledger.bad),
      **self._identity,
    }

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
    self._position = state['batches']
    self._order = state.get('order', 0)
    self._newest_order = max(self._newest_order, self._order)
    self._ledger.bad = set(state.get('bad_examples', ()))
    self._ledger.replaced = state.get('replaced_examples', 0)
    self._restarts = max(self._restarts, state.get('worker_restarts', 0))
    self._reopen()

  def _reopen(self):
    self._stream.close()
    self._stream = self._open()

  def start_prefetch(self):
    """Starts to read batches ahead, before the first is asked for."""
    self._stream.start()

  def close(self):
    """Stops threads and workers; the iterator is of no more use."""
    if not self._closed:
      self._stream.close()
    super().close()


def valid_batches(
  source,
  batch_size,
  limit=None,
  process_index=0,
  process_count=1,
  threads=2,
  prefetch=2,
  start=0,
  data=None,
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
    data: config.Data, whose limits of bad examples and of waiting hold: examples that cannot be
      read are reported and left out, as `mask` says. Without it the first of them is an error,
      and the defaults hold for waiting.

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
  read = bad_examples.Reader(source, data.max_bad_examples) if data else None

  def gather(batch):
    indices = start + np.arange(batch * batch_size, (batch + 1) * batch_size)[part]
    real = np.minimum(indices, count - 1)
    examples, failures = read(real) if read else (source.gather(real), ())
    if examples is None:
      return None, failures
    bad = np.isin(real, [failure.index for failure in failures])
    mask = (indices < count) & ~bad
    return {**examples, 'index': real.astype(np.int32), 'mask': mask}, failures

  batches = -(-max(count - start, 0) // batch_size)
  stream = prefetching.ReadAhead(gather, threads, prefetch, batches)
  settings = data or config_lib.Data()
  patience = prefetching.Patience(
    settings.stall_seconds, settings.stall_limit_seconds, what='validation data'
  )
  ledger = bad_examples.Ledger(settings.max_bad_examples, 'validation examples')
  try:
    for _ in range(batches):
      batch, failures = stream.take(patience)
      ledger.note(failures, 'it is left out')
      yield batch
  finally:
    stream.close()


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
