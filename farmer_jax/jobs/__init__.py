"""What a user can ask for: one module a job, each with `run(config, workdir)`."""

import contextlib
import importlib

import jax

from farmer_jax.distributed import preemption, processes
from farmer_jax.xla import host

_TRAIN = ('pretrain', 'distill')


def run(config, workdir):
  """Prepares this process and runs the job that `config` names."""
  host.keep_memory()  # before the first computation
  asked = {'likelihood': config.likelihood.dtype, 'sample': config.sampling.dtype}
  asked['fidelity'] = asked['sample']
  if 'float64' in (config.model.dtype, asked.get(config.job)):
    jax.config.update('jax_enable_x64', True)
  # Products of float32 arrays in float32: accelerators would round the factors to fewer bits, and
  # the inverse of the flow would undo something else. bfloat16 models are not affected.
  jax.config.update('jax_default_matmul_precision', 'highest')
  job = importlib.import_module(f'farmer_jax.jobs.{config.job}')
  # Training has something to save first. It listens itself, as does JAX for several processes.
  listens = config.job in _TRAIN and jax.process_count() > 1
  preempted = None
  try:
    with contextlib.nullcontext() if listens else preemption.leave_at_once():
      job.run(config, workdir)
  except preemption.Preempted as notice:
    preempted = notice
  # The first process may have more to do than the others, which would give it up if they ended.
  processes.wait_for_all('end')
  if preempted:
    raise preempted
