"""Handles preemption: clusters send SIGTERM some time before they take a machine away."""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h. The progress is saved, and the same command resumes the job.
EXIT_CODE = 75

# A cluster may send one notice twice, to the process and to its process group. A SIGTERM within
# this many seconds of the first one is ignored.
_DUPLICATE_SECONDS = 1.0


class Preempted(Exception):
  """The job has saved its progress and must be started again. `main` exits with `EXIT_CODE`."""


class PreemptionListener:
  """Context in which SIGTERM requests a stop after the current step.

  A second SIGTERM exits at once. After the context, the previous signal handler is active again.
  """

  def __init__(self) -> None:
    self._num_signals, self._first_time = 0, 0.0
    self._jax_handler: Callable[[int], None] | None = None

  def __enter__(self) -> 'PreemptionListener':
    # With several processes, JAX has installed a signal handler in C, through which all processes
    # agree on the step after which they stop. Python does not know this handler, so `_on_signal`
    # calls it.
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
      self._jax_handler = _c_handler()
    self._previous = _set_handler(self._on_signal)
    return self

  def __exit__(self, *exception: object) -> None:
    _set_handler(self._previous)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._num_signals += 1
    if self._num_signals > 1:
      if time.monotonic() - self._first_time > _DUPLICATE_SECONDS:
        os._exit(128 + number)
      return
    self._first_time = time.monotonic()
    logging.warning('SIGTERM: the job saves a checkpoint and exits. Another SIGTERM exits at once.')
    if self._jax_handler:
      self._jax_handler(number)

  def should_stop(self, step: int) -> bool:
    """Returns whether to save and exit after `step`. Must be called after each step.

    After any process has received SIGTERM, all processes get True at the same step.
    """
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._num_signals > 0


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
  """Context of a job without unsaved progress. SIGTERM exits at once with `EXIT_CODE`."""
  previous = _set_handler(lambda number, frame: os._exit(EXIT_CODE))
  try:
    yield
  finally:
    _set_handler(previous)


def _set_handler(handler: Any) -> Any:
  """Sets the handler of SIGTERM. Returns the previous handler, or None if it is unknown."""
  # Python allows signal handlers only in the main thread. A job in another thread, for example in a
  # notebook, does not handle SIGTERM.
  if threading.current_thread() is threading.main_thread():
    return signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
  return None


def _c_handler() -> Callable[[int], None] | None:
  """Removes the SIGTERM handler of C code. Returns it as a function, or None if there is none."""
  set_handler = ctypes.CDLL(None).signal
  set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
  address = set_handler(signal.SIGTERM, None)
  if not address or address in (1, ctypes.c_void_p(-1).value):  # SIG_DFL, SIG_IGN, SIG_ERR
    return None
  return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
