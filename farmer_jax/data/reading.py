"""Reads batches of a source, with replacements for examples that cannot be read.

A file can become damaged or missing days after a run has started. Grain and TFDS stop at the first
bad file. This module reads another example instead. The replacement depends only on the index of
the bad example, so that batches do not depend on threads, workers or processes.

Each thread records which example it is reading, so that a warning about a slow read can name the
example. Neither Grain nor `concurrent.futures` reports what a thread is working on.
"""

import dataclasses
import threading
import time
from collections.abc import Iterable

import numpy as np
from absl import logging
from jaxtyping import Int

from farmer_jax.data import base
from farmer_jax.errors import DataError, UserError

# Number of examples that are tried, including the original, before reading fails.
_ATTEMPTS = 100

# The reads in progress: thread identifier -> (start time, source, index).
_reads: dict[int, tuple[float, base.Source, int]] = {}


@dataclasses.dataclass(frozen=True)
class BadExample:
  """An example that could not be read."""

  index: int  # in the source
  problem: str
  replacement: str  # name of the example that is tried next


# A batch, which is empty if more than `data.max_bad_examples` are bad, and the bad examples.
ReadResult = tuple[base.Batch, tuple[BadExample, ...]]


def read_batch(
  source: base.Source, max_bad_examples: int, indices: Int[np.ndarray, 'B']
) -> ReadResult:
  """Reads the examples at `indices`, or replacements of examples that cannot be read.

  Raises:
    DataError: an example is bad, and so are all replacements that were tried.
  """
  if isinstance(source, base.ArraySource):
    return source.gather(indices), ()
  examples: list[base.Example] = []
  bad: list[BadExample] = []
  for wanted in indices.tolist():
    index = wanted
    for attempt in range(_ATTEMPTS):
      try:
        examples.append(_read_example(source, index))
        break
      except base.BadExampleError as error:
        problem = f'{error.name} cannot be read ({error.reason})'
        replacement = replacement_index(wanted, attempt, len(source))
        bad.append(BadExample(index, problem, source.name(replacement)))
      if len({example.index for example in bad}) > max_bad_examples:
        return {}, tuple(bad)
      index = replacement
    else:
      raise DataError(
        f'{source.name(wanted)} and {_ATTEMPTS - 1} replacements cannot be read:'
        f' {bad[-1].problem}; repair the data'
      )
  return base.stack(examples), tuple(bad)


def _read_example(source: base.Source, index: int) -> base.Example:
  """Returns `source[index]`, and records the read while it is in progress.

  Converts exceptions except UserError to RuntimeError, whose message names the example, because
  pickle, which sends exceptions from workers, fails for some types.
  """
  thread = threading.get_ident()
  _reads[thread] = time.monotonic(), source, index
  try:
    return source[index]
  except UserError:
    raise
  except Exception as error:
    message = f'{type(error).__name__}: {" ".join(str(error).split())}'
    raise RuntimeError(f'reading {source.name(index)}: {message}') from error
  finally:
    del _reads[thread]


def replacement_index(index: int, attempt: int, count: int) -> int:
  """Returns the index in [0, count) of replacement `attempt` of the example at `index`.

  The index is random, because the neighbors of a damaged record are often in the same damaged file.
  """
  return int(np.random.default_rng((index, attempt)).integers(count))


def slowest_read() -> tuple[str, float]:
  """Returns the name and the time, in seconds, of the longest read in progress, or ('', 0.0)."""
  reads = _reads.copy().values()
  if not reads:
    return '', 0.0
  start, source, index = min(reads, key=lambda read: read[0])
  return source.name(index), time.monotonic() - start


def start_reporting(period: float, *unused_worker_numbers: int) -> None:
  """Starts a thread in a worker process that logs examples that take longer than `period` seconds.

  The main process does not know which example a worker reads. Grain appends the index of the worker
  and the number of workers to the arguments.
  """

  def report() -> None:
    while True:
      time.sleep(period)
      name, seconds = slowest_read()
      if seconds > period:
        logging.warning(f'A worker process has been reading {name} for {seconds:.0f} s.')

  threading.Thread(target=report, daemon=True, name='slow-reads').start()


class BadExampleCounter:
  """Counts and logs bad examples of `split`, 'training' or 'validation'.

  Attributes:
    indices: indices in the source of the bad examples, at most `limit` of them.
    reads: number of reads that failed. A bad example is read again in every epoch.
  """

  def __init__(self, limit: int, split: str):
    self._limit, self._split = limit, split
    self.indices: set[int] = set()
    self.reads = 0

  def add(self, bad: Iterable[BadExample]) -> None:
    """Counts and logs the bad examples of a batch. Raises DataError if the limit is exceeded."""
    for example in bad:
      self.indices.add(example.index)
      self.reads += 1
      if len(self.indices) > self._limit:
        raise DataError(
          f'{example.problem}: more than --config.data.max_bad_examples={self._limit}'
          f' {self._split} examples are bad; repair them, or raise the limit'
        )
      replaced = self._split == 'training'  # Evaluation leaves out bad examples.
      action = f'replaced by {example.replacement}' if replaced else 'left out'
      logging.warning(
        f'{example.problem}; {action}. Bad {self._split} examples: {len(self.indices)} of at most'
        f' {self._limit}.'
      )
