"""Several processes that run one job together."""

import jax
from jax.experimental import multihost_utils

from farmer_jax.distributed import agreement
from farmer_jax.errors import ConfigError


def start(coordinator=None, num_processes=None, process_id=None):
  """Joins this process to the others of its job; to be called before any other use of JAX.

  Without arguments the environment says who they are: JAX knows TPU pods, SLURM, Open MPI and
  Kubernetes.

  Args:
    coordinator: host:port of the first process.
    num_processes: of the job.
    process_id: of this one, from 0.

  Raises:
    ConfigError: the arguments are incomplete or wrong, or the environment says nothing.
  """
  given = (coordinator, num_processes, process_id)
  explicit = any(value is not None for value in given)
  if explicit and any(value is None for value in given):
    raise ConfigError('--coordinator, --num_processes and --process_id go together; give all three')
  if explicit and not 0 <= process_id < num_processes:
    raise ConfigError(f'--process_id={process_id} must be from 0 to {num_processes - 1}')
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except (RuntimeError, ValueError) as error:
    reason = ' '.join(str(error).split())
    raise ConfigError(f'cannot join the other processes: {reason}') from error


def by_first(action):
  """Runs action() in the first process alone; if that ends in a ConfigError, all processes do."""
  error = None
  if not jax.process_index():
    try:
      action()
    except ConfigError as raised:
      error = raised
  failed = agreement.first(error and str(error))
  if error:
    raise error
  if failed:
    raise ConfigError('the first process has stopped; its message says why')


def wait_for_all(what):
  """Returns once all processes have come here; `what` tells places apart."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
