"""Examples that cannot be read while a run goes on: what takes their place, who says so, how often.

An example may be whole when a run starts and gone, damaged or behind a hanging file system days
later. Another one, which depends on its place in the source alone, takes its place, so that the
batches do not depend on threads, workers or processes even then.
"""

import dataclasses
import threading
import time

import numpy as np
from absl import logging

from farmer_jax.data import base
from farmer_jax.errors import ConfigError

# Examples tried in the place of one before giving up.
_ATTEMPTS = 100

# What each thread of this process is reading: (since when, source, index).
_reading: dict = {}


@dataclasses.dataclass(frozen=True)
class Failure:
  """An example that could not be read."""

  index: int  # its place in the source
  name: str
  reason: str
  replacement: str  # name of the example tried next


class Reader:
  """Reads batches of a source, with other examples in the place of those that cannot be read."""

  def __init__(self, source, limit):
    self._source = source
    self._limit = limit

  def __call__(self, indices):
    """The examples at `indices` [B].

    Returns:
      A batch as `Source.gather` makes them, and a tuple of `Failure`. The batch is None if more
      than `limit` examples failed.

    Raises:
      ConfigError: the settings do not fit the examples, or nearly none can be read.
    """
    if isinstance(self._source, base.ArraySource):
      return self._source.gather(indices), ()
    failures: list[Failure] = []
    examples = []
    for index in indices:
      examples.append(self._example(int(index), failures))
      if len({failure.index for failure in failures}) > self._limit:
        return None, tuple(failures)
    return base.stack(examples), tuple(failures)

  def _example(self, wanted, failures):
    """The example at `wanted`, or the one in its place; adds to the list of `failures`."""
    index = wanted
    for attempt in range(_ATTEMPTS):
      try:
        return read(self._source, index)
      except base.BadExampleError as error:
        other = substitute(wanted, attempt, len(self._source))
        failure = Failure(index, error.name, error.reason, self._source.name(other))
      failures.append(failure)
      if len({failure.index for failure in failures}) > self._limit:
        return None
      index = other
    raise ConfigError(
      f'{self._source.name(wanted)} cannot be read, and neither can {_ATTEMPTS - 1} others drawn to'
      f' take its place, such as {failure.name} ({failure.reason})'
    )


def read(source, index):
  """`source[index]`, on record as being read meanwhile.

  Raises:
    ConfigError: what the source raises. Whatever else it raises becomes a RuntimeError that says
      which example it was, since exceptions of unknown types may not survive the way from a worker.
  """
  thread = threading.get_ident()
  _reading[thread] = time.monotonic(), source, index
  try:
    return source[index]
  except ConfigError:
    raise
  except Exception as error:
    what = f'{type(error).__name__}: {" ".join(str(error).split())}'
    raise RuntimeError(f'reading {source.name(index)}: {what}') from error
  finally:
    del _reading[thread]


def substitute(index, attempt, count):
  """Which of `count` examples takes the place of the one at `index`, after `attempt` others.

  Drawn, not next to it: the neighbours of a damaged record are in the same damaged file.
  """
  return int(np.random.default_rng((index, attempt)).integers(count))


def longest_read(more_than=0.0):
  """(name, seconds) of the example that a thread of this process has been reading for the longest
  time, of more than so many seconds; or None."""
  now = time.monotonic()
  since, source, index = min(_reading.copy().values(), default=(now, None, 0), key=lambda r: r[0])
  if source is None or now - since <= more_than:
    return None
  return source.name(index), now - since


def watch(period, *unused):
  """Starts a thread that says, every `period` seconds, which example is slow to be read.

  For worker processes, whose parent sees only that no batch comes.
  """
  del unused  # Grain's numbers of the worker.

  def run():
    while True:
      time.sleep(period)
      if slow := longest_read(period):
        logging.warning('%s: a worker process has been reading it for %.0f s', *slow)

  threading.Thread(target=run, daemon=True, name='watch').start()


class Ledger:
  """Counts and reports bad examples, up to a limit.

  Args:
    limit: number of different examples that may be bad.
    what: which examples they are, in messages.
  """

  def __init__(self, limit, what='training examples'):
    self._limit = limit
    self._what = what
    self.bad: set[int] = set()  # places in the source
    self.replaced = 0  # times that one had to be replaced

  def note(self, failures, done='{} takes its place'):
    """Reports every failure in a line of the log.

    Raises:
      ConfigError: there are more bad examples than the limit.
    """
    for failure in failures:
      self.bad.add(failure.index)
      self.replaced += 1
      if len(self.bad) > self._limit:
        raise ConfigError(
          f'{failure.name} cannot be read ({failure.reason}): more of the {self._what} are bad than'
          f' --config.data.max_bad_examples={self._limit}; repair them, or raise that'
        )
      logging.warning(
        '%s cannot be read (%s); %s. Bad %s: %d of at most %d.',
        failure.name,
        failure.reason,
        done.format(failure.replacement),
        self._what,
        len(self.bad),
        self._limit,
      )
