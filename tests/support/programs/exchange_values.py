"""Two processes exchange values and wait at barriers. Each process prints its results as JSON.

Started by `processes.Job(..., processes=2, module='tests.support.programs.exchange_values')`.
"""

import json
import sys

from farmer_jax import errors
from farmer_jax.checkpoints import orbax_internals
from farmer_jax.distributed import processes


def fail():
  raise errors.WorkdirError('the workdir is a file')


if __name__ == '__main__':
  flags = dict(argument.split('=') for argument in sys.argv[1:])
  number = int(flags['--process_id'])
  processes.start(flags['--coordinator'], int(flags['--num_processes']), number)
  results = {'gathered': processes.gather(['long text'] * number)}
  try:
    processes.on_process_zero(fail)
  except errors.UserError as error:
    results['error'] = type(error).__name__
  barrier = orbax_internals.make_barrier()
  barrier(key='start', timeout_ms=60_000)
  # Simulates a failed save in process 1, which never reaches this barrier.
  if number == 0:
    try:
      barrier(key='async_write_complete', timeout_ms=60_000)
    except OSError:
      results['left_alone'] = True
  barrier(key='next save', timeout_ms=60_000)
  processes.barrier('end')
  print(json.dumps(results))
