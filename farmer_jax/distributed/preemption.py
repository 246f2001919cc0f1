"""Handles signals that end a job: the job saves its progress and can be started again.

Clusters send SIGTERM some time before they take a machine away, and SLURM also SIGUSR1. A terminal
that is closed sends SIGHUP. Ctrl-C sends SIGINT.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from farmer_jax import errors

EXIT_CODE = errors.EXIT_CODE_PREEMPTED

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# A cluster may send one notice twice, to the process and to its process group. A signal within
# this many seconds of the first one is ignored.
_DUPLICATE_SECONDS = 1.0


class Preempted(Exception):
  """The job has saved its progress and must be started again. `main` exits with `EXIT_CODE`."""


class PreemptionListener:
  """Context in which a signal requests a stop after the current step.

  A second signal exits at once. After the context, the previous handlers are active again.
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
    self._previous = _set_handlers(dict.fromkeys(_SIGNALS, self._on_signal))
    return self

  def __exit__(self, *exception: object) -> None:
    _set_handlers(self._previous)

  def _on_signal(self, number: int, _: FrameType | None) -> None:
    self._num_signals += 1
    if self._num_signals > 1:
      if time.monotonic() - self._first_time > _DUPLICATE_SECONDS:
        os._exit(128 + number)
      return
    self._first_time = time.monotonic()
    name = signal.Signals(number).name
    logging.warning(f'{name}: the job saves a checkpoint and exits. Another signal exits at once.')
    if self._jax_handler:
      self._jax_handler(signal.SIGTERM)

  def should_stop(self, step: int) -> bool:
    """Returns whether to save and exit after `step`. Must be called after each step.

    After any process has received a signal, all processes get True at the same step.
    """
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._num_signals > 0


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
  """Context of a job without unsaved progress. A signal exits at once with `EXIT_CODE`.

  Ctrl-C raises KeyboardInterrupt, so that it does not end a notebook.
  """
  signals = [number for number in _SIGNALS if number != signal.SIGINT]
  previous = _set_handlers(dict.fromkeys(signals, lambda number, frame: os._exit(EXIT_CODE)))
  try:
    yield
  finally:
    _set_handlers(previous)


def _set_handlers(handlers: Mapping[int, Any]) -> dict[int, Any]:
  """Sets the handlers of signals. Returns the previous handlers, None if one is unknown.

  Python allows signal handlers only in the main thread. A job in another thread, for example in a
  notebook, handles no signals. Ignored signals stay ignored: nohup ignores SIGHUP.
  """
  if threading.current_thread() is not threading.main_thread():
    return {}
  return {
    number: signal.signal(number, handler or signal.SIG_DFL)
    for number, handler in handlers.items()
    if signal.getsignal(number) is not signal.SIG_IGN
  }


def _c_handler() -> Callable[[int], None] | None:
  """Removes the SIGTERM handler of C code. Returns it as a function, or None if there is none."""
  set_handler = ctypes.CDLL(None).signal
  set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
  address = set_handler(signal.SIGTERM, None)
  if not address or address in (1, ctypes.c_void_p(-1).value):  # SIG_DFL, SIG_IGN, SIG_ERR
    return None
  return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
