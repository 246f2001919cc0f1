"""Being told to leave: SIGTERM, which clusters send some time before they take a machine away."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: all is saved that can be; the same command, started again, goes on.
START_AGAIN = 75

# Seconds within which one notice may come twice, to the process and to its group.
_DOUBLED = 1.0


class Preempted(Exception):
  """The job has saved what it did and is to be started again; main exits with `START_AGAIN`."""


class Notice:
  """Notices SIGTERM in a job that has something to save first. The second one ends it at once.

  Use as a context: outside of it signals do what they did before.
  """

  def __init__(self):
    self._signals, self._first = 0, 0.0
    self._forward = None

  def __enter__(self):
    # Only a main thread may handle signals; a job in another one, as in a notebook, goes without.
    if threading.current_thread() is threading.main_thread():
      # In several processes JAX has a handler in C, of which Python knows nothing: what it notices
      # it makes all of them agree on. It must go on hearing.
      if jax.process_count() > 1:
        self._forward = _c_handler()
      self._before = signal.signal(signal.SIGTERM, self._notice)
    return self

  def __exit__(self, *exception):
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

  def _notice(self, number, frame):
    del frame
    self._signals += 1
    if self._signals > 1:
      if time.monotonic() - self._first > _DOUBLED:
        os._exit(128 + number)
      return
    self._first = time.monotonic()
    print('SIGTERM: saving, then leaving; once more leaves at once.', file=sys.stderr, flush=True)
    if self._forward:
      self._forward(number)

  def reached(self, step):
    """Whether to save and leave after `step`: in all processes after the same one, once one of them
    was told. To be called after each step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._signals > 0


@contextlib.contextmanager
def leave_at_once():
  """Context of a job that has nothing to save: SIGTERM ends it, to be started again."""

  def leave(number, frame):
    del number, frame
    os._exit(START_AGAIN)

  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGTERM, leave)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _c_handler():
  """The handler of SIGTERM that C code has set, as a function, or None."""
  set_handler = ctypes.CDLL(None).signal
  set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
  address = set_handler(signal.SIGTERM, None)
  if not address or address in (1, ctypes.c_void_p(-1).value):  # SIG_DFL, SIG_IGN, SIG_ERR
    return None
  return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
