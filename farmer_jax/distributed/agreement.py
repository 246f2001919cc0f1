"""How processes that work together agree on what happened to each."""

import itertools
import json

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint._src.multihost import multihost


def gather(value):
  """What each process calls this with, a list; values must be writable as JSON."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
  padded = np.pad(data, (0, lengths.max() - data.size))
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def first(value):
  """The first that is not None of what the processes call this with."""
  return next((found for found in gather(value) if found is not None), None)


def make_barrier():
  """Makes barriers for the threads that write checkpoints; None if there is one process.

  Orbax has the others wait for a process that has failed until time is up. Here every process says
  at which barrier it is: those that wait for one that has gone on without them raise OSError.
  """
  if jax.process_count() == 1:
    return None
  client = multihost.get_jax_distributed_client()
  maker, numbers = next(_MAKERS), itertools.count()
  process, processes = jax.process_index(), jax.process_count()

  def place(number, who):
    return f'farmer_jax/barrier/{maker}/{number}/{who}'

  def barrier(*, key, timeout_ms):
    while True:
      number = next(numbers)
      client.key_value_set(place(number, process), key)
      client.wait_at_barrier(place(number, 'all'), timeout_ms)
      if number:  # Whoever has come here has read these.
        client.key_value_delete(place(number - 1, process))
      keys = {client.blocking_key_value_get(place(number, p), timeout_ms) for p in range(processes)}
      if keys == {key}:
        return
      if 'async_' in key:
        raise OSError('another process could not write its part')

  return barrier


_MAKERS = itertools.count()
