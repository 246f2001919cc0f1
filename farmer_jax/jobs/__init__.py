"""The jobs of the command line: one module per job, each with `run(config, workdir)`."""

import contextlib
import importlib

import jax

from farmer_jax import config as config_lib
from farmer_jax.distributed import preemption, processes
from farmer_jax.xla import host, memory


def run(config: config_lib.Config, workdir: str) -> None:
  """Prepares this process and runs the job `config.job` in a workdir, a path or a URL.

  Raises:
    UserError: the job cannot run. The message says what to change.
    preemption.Preempted: the job saved its progress after a signal and must be started again.
  """
  # Allocator settings apply only to memory that is allocated later.
  host.configure_malloc()
  job_dtypes = {
    'likelihood': config.likelihood.dtype,
    'sample': config.sampling.dtype,
    'fidelity': config.sampling.dtype,
  }
  host.configure_jax('float64' in (config.model.dtype, job_dtypes.get(config.job)))
  module = importlib.import_module(f'farmer_jax.jobs.{config.job}')
  # JAX handles SIGTERM in jobs of several processes. Training uses JAX's handler to write a
  # checkpoint at the same step in all processes.
  keep_jax_handler = config.job in ('pretrain', 'distill') and jax.process_count() > 1
  preempted = None
  handler = contextlib.nullcontext() if keep_jax_handler else preemption.exit_on_signals()
  try:
    with handler, memory.explained(config):
      module.run(config, workdir)
  except preemption.Preempted as error:
    preempted = error
  # If a process exits, JAX terminates the others. Process 0 may still be writing results.
  processes.barrier('end')
  if preempted:
    raise preempted
