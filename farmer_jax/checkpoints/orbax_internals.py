"""Uses of Orbax, TensorStore and JAX beyond their public interfaces.

This module depends on texts of exceptions, keys of barriers, log records, the list of items, and
the client of JAX's coordination service. It is written for Orbax 0.12.8, TensorStore 0.1.86 and JAX
0.10.2. tests/checkpoints/test_orbax_internals.py fails if a new version differs.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint._src.multihost import multihost
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from farmer_jax import errors
from farmer_jax.workdir import stores
from farmer_jax.xla import memory

# TensorStore's status codes for faults of the machine, the network or the user's permissions.
_ENVIRONMENT_STATUS = re.compile(
  'PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED'
)

# Part of the key of every barrier at which Orbax waits for processes that write a checkpoint.
_SAVE_BARRIER = 'async_'


class CorruptCheckpoint(Exception):
  """A checkpoint differs from the saved values. The message is the reason, without the step."""


@contextlib.contextmanager
def classify_exceptions() -> Iterator[None]:
  """Converts faults of the environment to `CheckpointError`, and others to `CorruptCheckpoint`.

  Orbax and TensorStore raise almost any type of exception for corrupt files.
  """
  try:
    yield
  except (CorruptCheckpoint, errors.UserError):
    raise
  except Exception as error:
    if isinstance(error, jax.errors.JaxRuntimeError) and memory.is_exhausted(error):
      raise  # The devices are too small for the arrays, see `memory.explained`.
    environment = _ENVIRONMENT_STATUS.search(str(_root_cause(error)))
    if isinstance(error, PermissionError | MemoryError) or environment:
      raise errors.CheckpointError(f'cannot read a checkpoint: {describe(error)}') from error
    raise CorruptCheckpoint(describe(error)) from error


def describe(error: BaseException) -> str:
  """Describes an exception of Orbax or TensorStore in a few words, without long paths."""
  error = _root_cause(error)
  text = ' '.join(str(error).split())
  if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
    return 'a metadata file cannot be read'
  if isinstance(error, OSError) and error.strerror:
    return error.strerror + (f': {epath.Path(error.filename).name}' if error.filename else '')
  if system := re.search(r'([^:]+) \[os_error_code', text):
    return system[1].strip()
  if status := re.match('([A-Z_]+): ', text):
    return f'an array cannot be read: {status[1].lower().replace("_", " ")}'
  return (text if len(text) <= 120 else f'{text[:117]}...') or type(error).__name__


def _root_cause(error: BaseException) -> BaseException:
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def item_names(folder: epath.Path) -> set[str]:
  """Returns the names of the items that were saved in a checkpoint, even if they are missing."""
  return set(json.loads((folder / '_CHECKPOINT_METADATA').read_text())['item_handlers'])


def make_barrier() -> Callable[..., None] | None:
  """Returns the `barrier_sync_fn` of `ocp.AsyncOptions`, or None for a single process.

  At Orbax's own barrier, processes wait until the timeout for a process that failed to save. Here,
  each process publishes the key at which it waits. If the keys differ, one process has left the
  save, and the processes that are still in the save raise `OSError`.
  """
  if jax.process_count() == 1:
    return None
  client = multihost.get_jax_distributed_client()
  barrier_id, numbers = next(_BARRIER_IDS), itertools.count()
  process, processes = jax.process_index(), jax.process_count()

  def path(number: int, suffix: object) -> str:
    return f'farmer_jax/barrier/{barrier_id}/{number}/{suffix}'

  def barrier(*, key: str, timeout_ms: int) -> None:
    while True:
      number = next(numbers)
      client.key_value_set(path(number, process), key)
      client.wait_at_barrier(path(number, 'all'), timeout_ms)
      if number:  # All processes have read the previous keys.
        client.key_value_delete(path(number - 1, process))
      keys = {client.blocking_key_value_get(path(number, p), timeout_ms) for p in range(processes)}
      if keys == {key}:
        return
      if _SAVE_BARRIER in key:
        raise OSError('another process could not write its shards')

  return barrier


_BARRIER_IDS = itertools.count()


def support_s3() -> None:
  """Makes Orbax treat s3:// like gs://. TensorStore has a driver for both.

  Without this, Orbax refuses s3:// because it is not an absolute path.
  """
  prefixes = ('gs://', 's3://')
  gcs_utils.is_gcs_path = lambda path: path.as_posix().startswith(prefixes)
  gcs_utils.get_kvstore_for_gcs = stores.tensorstore_spec
  tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(prefixes)
  tensorstore_utils._normalize_path = lambda path: re.sub(
    '^(gs|s3):/', r'\1://', os.path.normpath(path)
  )


def hide_orbax_errors() -> None:
  """Hides tracebacks of failures that `Checkpointer` reports, except with --verbosity=1.

  When one array cannot be read or written, Orbax closes its event loop. Each unfinished operation
  of TensorStore then prints a traceback with `sys.excepthook`, or asyncio logs it.
  """
  absl_logging.get_absl_logger().addFilter(_is_not_orbax_error)
  logging.getLogger('asyncio').addFilter(_is_not_lost_exception)
  print_unraisable = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed' or _shows_everything():
      print_unraisable(unraisable)

  sys.unraisablehook = hook


def _is_not_orbax_error(record: logging.LogRecord) -> bool:
  is_orbax_error = 'orbax' in record.pathname and record.levelno == logging.ERROR
  return not is_orbax_error or _shows_everything()


def _is_not_lost_exception(record: logging.LogRecord) -> bool:
  return 'exception was never retrieved' not in record.getMessage() or _shows_everything()


def _shows_everything() -> bool:
  return absl_logging.get_verbosity() >= absl_logging.DEBUG
