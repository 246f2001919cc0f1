"""Threads and worker processes that read batches ahead, with a limit on the waiting time.

Grain's `ThreadPrefetchIterDataset` and the executors of `concurrent.futures` also read ahead. They
wait for their threads without limit, even when the program ends. But a read from a network file
system that hangs never returns and cannot be interrupted. This module uses daemon threads. It logs
long waits for a batch and raises an error at a limit. The program can end while a thread hangs.

Grain starts the worker processes and sends their batches through shared memory. Grain 0.2.18 does
not restart a worker that dies. It waits without limit for a worker that hangs or has ended with
exit code 0, and its public API does not expose the processes. `WorkerPrefetcher` finds them with
`multiprocessing.active_children`.
"""

import atexit
import collections
import concurrent.futures
import contextlib
import functools
import math
import multiprocessing
import multiprocessing.process
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grain
from absl import logging

from farmer_jax import config
from farmer_jax.data import reading
from farmer_jax.errors import DataError, UserError

_POLL_SECONDS = 1.0  # longest time between two checks while a batch is awaited
_CLOSE_SECONDS = 3.0  # longest wait for threads and worker processes to end
_SEARCH_SECONDS = 0.02  # between two searches for worker processes, which take longer to start

# All prefetchers and threads that still exist.
_prefetchers: 'weakref.WeakSet[Prefetcher]' = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

Result = TypeVar('Result')


class Prefetcher(Generic[Result]):
  """An iterator over read(0), read(1), …, which are computed in threads."""

  def __init__(
    self,
    read: Callable[[int], Result],
    data: config.Data,
    split: str,
    threads: int,
    depth: int,
    count: float = math.inf,
  ):
    """Creates an iterator over `count` results, of which `depth` are read ahead.

    `data` sets the limits on waiting. `split` is 'training' or 'validation', for messages.
    """
    self._read, self._data, self._split = read, data, split
    self._threads, self._depth, self._count = threads, depth, count
    self._pending: collections.deque[concurrent.futures.Future] = collections.deque()
    self._tasks: queue.SimpleQueue = queue.SimpleQueue()
    self._submitted = 0
    self._closed = False
    _prefetchers.add(self)

  def start(self) -> None:
    """Starts to read ahead before the first call of `next`."""
    if not self._submitted:
      for _ in range(self._threads):
        # The threads hold no reference to this object, so that it is deleted after its last use.
        _start_thread(_read_tasks, self._tasks, self._read)
      weakref.finalize(self, _stop, self._tasks, self._threads).atexit = False
    while len(self._pending) < self._depth and self._submitted < self._count:
      future: concurrent.futures.Future = concurrent.futures.Future()
      self._tasks.put((future, self._submitted))
      self._pending.append(future)
      self._submitted += 1

  def __iter__(self) -> 'Prefetcher[Result]':
    return self

  def __next__(self) -> Result:
    """Waits for the next result. Raises DataError after a limit, or the exception of `read`."""
    self.start()
    if not self._pending:
      raise StopIteration
    future = self._pending.popleft()
    self.start()
    if not future.done():
      self._wait(future)
    return future.result()

  def _wait(self, future: concurrent.futures.Future) -> None:
    warning, limit = self._data.stall_warning_seconds, self._data.stall_limit_seconds
    start, reports = time.monotonic(), 0
    poll = min(_POLL_SECONDS, warning, limit or _POLL_SECONDS)
    while concurrent.futures.wait([future], timeout=poll).not_done:
      self._check()
      waited = time.monotonic() - start
      name, seconds = reading.slowest_read()
      slowest = f'; reading {name} has taken {seconds:.0f} s so far' if name else ''
      if limit and waited >= limit:
        self._kill()
        raise DataError(
          f'no {self._split} data for {waited:.0f} s'
          f' (--config.data.stall_limit_seconds={limit:g}){slowest}. A disk, a network or a worker'
          ' process hangs; repair it and restart the job'
        )
      if waited // warning > reports:
        reports = int(waited // warning)
        logging.warning(f'Waiting for {self._split} data for {waited:.0f} s{slowest}.')

  def _check(self) -> None:
    """Raises an exception if no further result can arrive."""

  def _kill(self) -> None:
    """Ends reads that hang, if possible."""

  def close(self) -> None:
    """Cancels all pending reads. Each thread ends after its current read."""
    self._closed, self._count = True, 0
    _stop(self._tasks, self._threads)


class WorkerDiedError(RuntimeError):
  """A worker process ended unexpectedly. The message gives the exit code or the signal."""


class WorkerPrefetcher(Prefetcher):
  """An iterator over a Grain data set, which `data.workers` worker processes read."""

  def __init__(self, dataset: grain.MapDataset, data: config.Data):
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
    self._stream = stream = iter(
      dataset.to_iter_dataset(options).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=data.workers),
        functools.partial(reading.start_reporting, data.stall_warning_seconds),
      )
    )
    self._other_children = frozenset(multiprocessing.active_children())
    self._children: frozenset[multiprocessing.process.BaseProcess] = frozenset()
    # One thread waits for Grain, so that the caller can stop waiting.
    super().__init__(lambda number: next(stream), data, 'training', threads=1, depth=1)

  def start(self) -> None:
    is_first = not self._submitted
    super().start()
    if is_first:
      _start_thread(self._search_children)

  def _search_children(self) -> None:
    """Finds the worker processes soon after their start.

    `multiprocessing` does not list a process that has ended. A worker can die before the training
    loop requests a batch, so the workers must be found earlier.
    """
    while not self._closed and not self._find_children():
      time.sleep(_SEARCH_SECONDS)

  def _find_children(self) -> bool:
    """Searches for the worker processes. Returns whether all of them have been found."""
    if len(self._children) < self._data.workers:
      self._children |= frozenset(multiprocessing.active_children()) - self._other_children
    return len(self._children) >= self._data.workers

  def __next__(self) -> Any:
    try:
      return super().__next__()
    except (UserError, WorkerDiedError):
      raise
    except Exception:
      # Grain raises RuntimeError if a worker died. If a worker raised an exception, Grain ends the
      # worker with exit code 0.
      self._check(expected=(None, 0))
      raise

  def _check(self, expected: tuple[int | None, ...] = (None,)) -> None:
    for child in self._children:
      if child.exitcode not in expected:
        raise WorkerDiedError(f'worker process {child.pid} ended {_cause(child.exitcode)}')

  def _kill(self) -> None:
    self._find_children()
    for child in self._children:
      child.kill()
    for child in self._children:
      child.join(_POLL_SECONDS)

  def close(self) -> None:
    """Ends the worker processes. Kills workers that do not end within a few seconds."""
    if self._closed:
      return
    super().close()
    if self._submitted:
      # Grain detects a dead worker within a second, and fails if it is closed earlier.
      concurrent.futures.wait(self._pending, _CLOSE_SECONDS)
    _start_thread(_close_stream, self._stream).join(_CLOSE_SECONDS)
    self._kill()
    # At the end of the program, Python could delete these objects after modules that Grain needs.
    self._pending.clear()
    del self._stream, self._read


def _close_stream(stream: grain.DatasetIterator) -> None:
  with contextlib.suppress(Exception):  # `close` kills the remaining processes.
    stream.close()


def _cause(exit_code: int | None) -> str:
  """Describes how a process ended."""
  if exit_code is None or exit_code >= 0:
    return f'with exit code {exit_code}'
  hints = {
    signal.SIGKILL: ' (the machine may be out of memory)',
    signal.SIGBUS: ' (/dev/shm may be full)',
  }
  number = signal.Signals(-exit_code)
  return f'by {number.name}{hints.get(number, "")}'


def _start_thread(function: Callable[..., object], *args: Any) -> threading.Thread:
  """Starts a daemon thread. At its end, the program waits a few seconds for the thread."""
  thread = threading.Thread(target=function, args=args, daemon=True)
  _threads.add(thread)
  thread.start()
  return thread


def _read_tasks(tasks: queue.SimpleQueue, read: Callable[[int], Any]) -> None:
  while task := tasks.get():
    future, number = task
    try:
      future.set_result(read(number))
    except BaseException as error:
      future.set_exception(error)
    del future, task  # Otherwise the last result stays in memory while the thread waits.


def _stop(tasks: queue.SimpleQueue, threads: int) -> None:
  """Removes all tasks, and makes each thread end after its current task."""
  with contextlib.suppress(queue.Empty):
    while True:
      tasks.get_nowait()
  for _ in range(threads):
    tasks.put(None)


@atexit.register
def _close_all() -> None:
  """Waits for the threads when the program ends, at most `_CLOSE_SECONDS` if a thread hangs.

  At the end of the program, Python kills a daemon thread when the thread returns from native code.
  Some libraries then crash.
  """
  for prefetcher in list(_prefetchers):
    prefetcher.close()
  deadline = time.monotonic() + _CLOSE_SECONDS
  for thread in list(_threads):
    thread.join(max(0.0, deadline - time.monotonic()))
