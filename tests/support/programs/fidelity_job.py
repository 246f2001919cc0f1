"""Runs the fidelity job. With --kill, kills itself with SIGKILL after the samples are drawn.

python -m tests.support.programs.fidelity_job CONFIG.json WORKDIR [--kill]
"""

import os
import signal
import sys

from farmer_jax.evaluation import feature_networks
from farmer_jax.jobs import fidelity
from tests.support import runs


class KillingNetwork(feature_networks.FeatureNetwork):
  """Kills this process before it computes the features of the samples."""

  def statistics(self, images, description, *args, **kwargs):
    if description == 'samples':
      os.kill(os.getpid(), signal.SIGKILL)
    return super().statistics(images, description, *args, **kwargs)


if __name__ == '__main__':
  if '--kill' in sys.argv:
    feature_networks.FeatureNetwork = KillingNetwork
  fidelity.run(runs.read_config(sys.argv[1]), sys.argv[2])
