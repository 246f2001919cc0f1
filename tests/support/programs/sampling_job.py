"""Runs the sampling job in shards of 12 images. Kills itself with SIGKILL after IMAGES images.

python -m tests.support.programs.sampling_job CONFIG.json WORKDIR [IMAGES]
"""

import os
import signal
import sys

from farmer_jax.jobs import sample
from farmer_jax.workdir import results
from tests.support import runs


class KillingResults(results.ResultFiles):
  """Kills this process when the results contain `limit` images."""

  limit = float('inf')

  def append(self, **arrays):
    super().append(**arrays)
    if len(self) >= self.limit:
      os.kill(os.getpid(), signal.SIGKILL)


if __name__ == '__main__':
  results.ROWS_PER_FILE, results._SECONDS_BETWEEN_WRITES = 12, 0.0
  results.ResultFiles = KillingResults
  if len(sys.argv) > 3:
    KillingResults.limit = int(sys.argv[3])
  sample.run(runs.read_config(sys.argv[1]), sys.argv[2])
