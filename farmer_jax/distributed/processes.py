"""Connects the processes of a job, exchanges values between them, and synchronizes them."""

import importlib.util
import json
import os
import zlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from farmer_jax import terminal
from farmer_jax.errors import ConfigError, ProcessError, UserError

T = TypeVar('T')

_CONNECT_SECONDS = 300


def start(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Connects this process to the other processes of the job. Must precede any other use of JAX.

  `coordinator` is host:port of process 0. If all arguments are None, their values come from the
  environment of TPU pods, SLURM, Open MPI or Kubernetes.

  Raises:
    ConfigError: the arguments are incomplete or out of range, or the environment has no cluster.
    ProcessError: the processes cannot connect.
  """
  method = None
  if (coordinator, num_processes, process_id) != (None, None, None):
    if coordinator is None or num_processes is None or process_id is None:
      raise ConfigError('set all three of --coordinator, --num_processes and --process_id')
    if not 0 <= process_id < num_processes:
      raise ConfigError(f'--process_id={process_id} must be from 0 to {num_processes - 1}')
    this = f'process {process_id} of {num_processes} to process 0 at {coordinator}'
  else:
    this = 'this process to the other processes of the cluster'
    if 'OMPI_COMM_WORLD_SIZE' in os.environ and 'OMPI_MCA_orte_hnp_uri' not in os.environ:
      # JAX finds the address of process 0 in a variable that only Open MPI 4 sets.
      coordinator, num_processes, process_id, method = _open_mpi_5()
  # `logging.info` would ask JAX for the index of the process, which is not known yet.
  terminal.print_status(
    f'Connecting {this}. Waiting at most {_CONNECT_SECONDS} s for all processes ...'
  )
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      cluster_detection_method=method,
      initialization_timeout=_CONNECT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    reason = ' '.join(str(error).split())
    if coordinator is None and 'coordinator_address' in reason:
      raise ConfigError(
        '--distributed found no TPU pod, SLURM, Open MPI or Kubernetes in the environment; start'
        ' the job with the launcher of the cluster, or set --coordinator, --num_processes and'
        ' --process_id'
      ) from error
    raise ProcessError(
      f'cannot connect to the other processes ({reason}); check --coordinator, --num_processes and'
      ' --process_id, or the environment of the cluster'
    ) from error


def _open_mpi_5() -> tuple[str | None, int | None, int | None, str | None]:
  """Returns arguments of `jax.distributed.initialize` for a process that Open MPI 5 started."""
  size, rank = (int(os.environ[f'OMPI_COMM_WORLD_{name}']) for name in ('SIZE', 'RANK'))
  if os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') == str(size):
    # All processes are on this host. The name of the job, which they share, selects a free port.
    port = 61440 + zlib.crc32(os.environ.get('PMIX_NAMESPACE', '').encode()) % 4096
    return f'localhost:{port}', size, rank, None
  if importlib.util.find_spec('mpi4py'):
    return None, None, None, 'mpi4py'
  raise ConfigError(
    'Open MPI 5 does not tell processes on several hosts the address of process 0; install mpi4py,'
    ' or set --coordinator, --num_processes and --process_id'
  )


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
