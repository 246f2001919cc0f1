"""Two processes exchange values and wait at barriers. Each process prints its results as JSON.

Started by `processes.Job(..., program=('exchange_values',), processes=2)`.
"""

import argparse
import json

from farmer_jax import errors
from farmer_jax.checkpoints import orbax_internals
from farmer_jax.distributed import processes


def fail():
  raise errors.WorkdirError('the workdir is a file')


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--coordinator')
  parser.add_argument('--num_processes', type=int)
  parser.add_argument('--process_id', type=int)
  flags, _ = parser.parse_known_args()
  number = flags.process_id
  processes.start(flags.coordinator, flags.num_processes, number)
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


if __name__ == '__main__':
  main()
