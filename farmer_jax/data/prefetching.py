"""Reading batches ahead of time in such a way that waiting for one can end.

`concurrent.futures` and Grain wait for their threads and workers without limit, also when a program
ends. A read from a file system that hangs never returns, and cannot be interrupted.
"""

import atexit
import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import queue
import re
import signal
import threading
import time
import weakref

import grain
from absl import logging

from farmer_jax.data import bad_examples
from farmer_jax.errors import ConfigError

# Seconds between looks at whether worker processes live, while no batch comes.
_LOOK_SECONDS = 1.0

# Seconds between looks for worker processes that are being born. Python takes longer to start.
_BIRTH_SECONDS = 0.02

# Seconds that threads and worker processes get to end in an orderly way.
_CLOSE_SECONDS = 3.0

# What is open, and all threads.
_streams: weakref.WeakSet = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class WorkerDiedError(RuntimeError):
  """A worker process has ended by itself; the message says how."""


class StallError(ConfigError):
  """Waiting took longer than the limit."""


class ReadAhead:
  """Calls read(0), read(1), … ahead of time in daemon threads; hands the results out in order."""

  def __init__(self, read, threads, depth, count=None):
    """Sets up.

    Args:
      read: called with consecutive numbers.
      threads: number of threads.
      depth: results kept ready.
      count: number of calls; None for no end.
    """
    self._pending: collections.deque[concurrent.futures.Future] = collections.deque()
    self._tasks: queue.SimpleQueue = queue.SimpleQueue()
    self._read, self._threads, self._depth = read, max(1, threads), max(1, depth)
    self._count = float('inf') if count is None else count
    self._submitted = 0
    self.closed = False
    _streams.add(self)

  def start(self):
    """Starts to read; the first `take` does so too."""
    if not self._submitted:
      for _ in range(self._threads):
        # The threads know nothing of this object: they end when it is forgotten.
        _start_thread(_work, self._tasks, self._read)
      weakref.finalize(self, _stop, self._tasks, self._threads).atexit = False
    while len(self._pending) < self._depth and self._submitted < self._count:
      future: concurrent.futures.Future = concurrent.futures.Future()
      self._tasks.put((future, self._submitted))
      self._pending.append(future)
      self._submitted += 1

  def take(self, patience):
    """The next result; raises what `read` raised.

    Args:
      patience: a `Patience`.

    Raises:
      StopIteration: there are no more.
      StallError: it took too long.
    """
    self.start()
    if not self._pending:
      raise StopIteration
    future = self._pending.popleft()
    self.start()
    if not future.done():
      patience.wait(future, self.check)
    return future.result()

  def check(self):
    """Raises WorkerDiedError if the next result will never come."""

  def kill(self):
    """Ends by force what hangs, where that is possible."""

  def close(self):
    """Gives up what is being read."""
    if not self.closed:
      self.closed = True
      self._close()

  def _close(self):
    self._count = 0
    _stop(self._tasks, self._threads)


def _start_thread(function, *args):
  thread = threading.Thread(target=function, args=args, daemon=True)
  _threads.add(thread)
  thread.start()
  return thread


def _work(tasks, read):
  while task := tasks.get():
    future, number = task
    try:
      future.set_result(read(number))
    except BaseException as error:
      future.set_exception(error)
    del future, task  # Or the thread would hold the last result while it waits.


def _stop(tasks, threads):
  """Has threads end after what they are reading."""
  with contextlib.suppress(queue.Empty):
    while True:
      tasks.get_nowait()
  for _ in range(threads):
    tasks.put(None)


@atexit.register
def _end():
  """Waits for the threads when the program ends, but not for those that hang.

  Python kills daemon threads on their return from native code, which brings some libraries down.
  """
  for stream in list(_streams):
    stream.close()
  deadline = time.monotonic() + _CLOSE_SECONDS
  for thread in list(_threads):
    thread.join(max(0.0, deadline - time.monotonic()))


class Workers(ReadAhead):
  """The elements of a Grain data set, read by worker processes."""

  def __init__(self, dataset, read_options, count, watch_seconds):
    """Sets up.

    Args:
      dataset: grain.MapDataset.
      read_options: grain.ReadOptions, of each worker.
      count: number of workers.
      watch_seconds: a worker says what it is reading whenever that takes longer.
    """
    self._stream = iter(
      dataset.to_iter_dataset(read_options).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=count),
        functools.partial(bad_examples.watch, watch_seconds),
      )
    )
    self._workers = count
    self._others = frozenset(multiprocessing.active_children())
    self._children: frozenset = frozenset()
    stream = self._stream
    super().__init__(lambda number: next(stream), threads=1, depth=1)

  def start(self):
    starts = not self._submitted
    super().start()
    if starts:
      _start_thread(_find_children, weakref.ref(self))

  def take(self, patience):
    try:
      return super().take(patience)
    except (ConfigError, WorkerDiedError):
      raise
    except Exception as error:
      # After any exception Grain ends the worker, with exit code 0.
      found = re.search(r'terminated unexpectedly with exit code (-?\d+)', str(error))
      if found:
        raise WorkerDiedError(f'a worker process ended {_how(int(found.group(1)))}') from error
      raise

  def check(self):
    for child in self._children:
      if not child.is_alive():
        raise WorkerDiedError(f'worker process {child.pid} ended {_how(child.exitcode)}')

  def find_children(self):
    """Looks for the worker processes; returns whether all of them are known."""
    if len(self._children) < self._workers:
      self._children |= frozenset(multiprocessing.active_children()) - self._others
    return len(self._children) >= self._workers

  def kill(self):
    self.find_children()
    for child in self._children:
      child.kill()
    for child in self._children:
      child.join(_LOOK_SECONDS)

  def _close(self):
    """Ends the worker processes, if need be by force."""
    super()._close()
    if self._submitted:
      # Grain sees within a second that a worker is gone. Closed meanwhile, it falls over itself.
      concurrent.futures.wait(self._pending, _CLOSE_SECONDS)
    _start_thread(_close_quietly, self._stream).join(_CLOSE_SECONDS)
    self.kill()
    # What is left ends with these references, not when modules are already gone.
    self._pending.clear()
    self._stream = self._read = None


def _find_children(reference):
  """Finds the worker processes of a `Workers` soon after their birth, by a weak reference to it.

  `multiprocessing` forgets a process that has ended as soon as anyone looks for processes. One that
  dies while nobody waits for a batch must be known by then.
  """
  while (workers := reference()) and not workers.closed and not workers.find_children():
    del workers
    time.sleep(_BIRTH_SECONDS)


def _close_quietly(stream):
  with contextlib.suppress(Exception):  # What is left of the processes will be killed.
    stream.close()


def _how(exit_code):
  """How a process ended, in words."""
  if exit_code is None or exit_code >= 0:
    return f'by itself, with exit code {exit_code}'
  hints = {
    signal.SIGKILL: ': perhaps for want of memory',
    signal.SIGBUS: ': perhaps /dev/shm is full',
  }
  name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else -exit_code
  return f'by {name}{hints.get(-exit_code, "")}'


class Patience:
  """How long to wait for a batch, and what to say meanwhile.

  Args:
    period: seconds after which, and after each of which, waiting is reported.
    limit: seconds after which it ends with an error; 0: never.
    what: what is waited for, in messages.
  """

  def __init__(self, period, limit, what='training data'):
    self._period, self._limit, self._what = period, limit, what

  def wait(self, future, check):
    """Returns when the future is done.

    Args:
      future: a `concurrent.futures.Future`.
      check: called now and then; raises what ends the waiting.

    Raises:
      StallError: it took longer than the limit.
    """
    start = time.monotonic()
    reported = 0
    step = min(_LOOK_SECONDS, self._period, self._limit or _LOOK_SECONDS)
    while concurrent.futures.wait([future], timeout=step).not_done:
      check()
      waited = time.monotonic() - start
      if self._limit and waited >= self._limit:
        raise StallError(
          f'no {self._what} for {waited:.0f} s (--config.data.stall_limit_seconds={self._limit:g})'
          f'{_culprit()}: a disk, a network or a worker process hangs; mend that and start again'
        )
      if waited // self._period > reported:
        reported = waited // self._period
        logging.warning('Waiting for %s for %.0f s%s.', self._what, waited, _culprit())


def _culprit():
  slow = bad_examples.longest_read()
  return f', the last {slow[1]:.0f} s of them for {slow[0]}' if slow else ''
