"""Runs the likelihood job, optionally as one of two processes. Can kill itself with SIGKILL.

python -m tests.support.programs.likelihood_job CONFIG.json WORKDIR [--kill_at=IMAGES]
    [--shard_size=IMAGES] [--coordinator=HOST:PORT --process_id=0]
"""

import argparse

import jax

from farmer_jax.jobs import likelihood
from farmer_jax.workdir import results
from tests.support import runs
from tests.support.programs import sampling_job


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('config')
  parser.add_argument('workdir')
  parser.add_argument('--kill_at', type=int)
  parser.add_argument('--shard_size', type=int, default=results.ROWS_PER_FILE)
  parser.add_argument('--coordinator')
  parser.add_argument('--process_id', type=int)
  flags = parser.parse_args()
  if flags.coordinator:
    jax.distributed.initialize(flags.coordinator, 2, flags.process_id)
  results.ROWS_PER_FILE = flags.shard_size
  if flags.kill_at:
    sampling_job.KillingResults.limit = flags.kill_at
    results.ResultFiles = sampling_job.KillingResults
  likelihood.run(runs.read_config(flags.config), flags.workdir)


if __name__ == '__main__':
  main()
