"""What a user can ask for: one module a job, each with `run(config, workdir)`."""

import importlib

import jax

from farmer_jax.runtime import distributed, host


def run(config, workdir):
  """Prepares this process and runs the job that `config` names."""
  host.keep_memory()  # before the first computation
  if 'float64' in (config.model.dtype, config.job == 'likelihood' and config.likelihood.dtype):
    jax.config.update('jax_enable_x64', True)
  # Products of float32 arrays in float32: accelerators would round the factors to fewer bits, and
  # the inverse of the flow would undo something else. bfloat16 models are not affected.
  jax.config.update('jax_default_matmul_precision', 'highest')
  importlib.import_module(f'farmer_jax.jobs.{config.job}').run(config, workdir)
  # The first process may have more to do than the others, which would give it up if they ended.
  distributed.wait_for_all('end')
