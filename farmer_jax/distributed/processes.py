"""Connects the processes of a job, exchanges values between them, and synchronizes them."""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from farmer_jax.errors import ConfigError, ProcessError, UserError

T = TypeVar('T')


def start(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Connects this process to the other processes of the job. Must precede any other use of JAX.

  `coordinator` is host:port of process 0. If all arguments are None, JAX reads their values from
  the environment of TPU pods, SLURM, Open MPI or Kubernetes.

  Raises:
    ConfigError: the arguments are incomplete or out of range.
    ProcessError: the processes cannot connect.
  """
  if (coordinator, num_processes, process_id) != (None, None, None):
    if coordinator is None or num_processes is None or process_id is None:
      raise ConfigError('set all three of --coordinator, --num_processes and --process_id')
    if not 0 <= process_id < num_processes:
      raise ConfigError(f'--process_id={process_id} must be from 0 to {num_processes - 1}')
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except (RuntimeError, ValueError) as error:
    reason = ' '.join(str(error).split())
    raise ProcessError(
      f'cannot connect to the other processes ({reason}); check --coordinator, --num_processes and'
      ' --process_id, or the environment of the cluster'
    ) from error


def gather(value: T) -> list[T]:
  """Gathers one value from each process, in the order of the processes, which must all call this.

  A value is anything that JSON can represent. `multihost_utils.process_allgather` takes only arrays
  of equal shapes.
  """
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
  padded = np.pad(data, (0, lengths.max() - data.size))
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def on_process_zero(action: Callable[[], object]) -> None:
  """Runs `action()` in process 0 while the other processes wait.

  If the action raises a `UserError`, the other processes raise `ProcessError`.
  """
  error = None
  if not jax.process_index():
    try:
      action()
    except UserError as raised:
      error = raised
  failed = any(gather(error is not None))
  if error:
    raise error
  if failed:
    raise ProcessError('process 0 failed; its error message names the cause')


def barrier(name: str) -> None:
  """Waits until all processes have called `barrier(name)`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
