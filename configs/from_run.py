"""The configuration that a run was made with, for other jobs on that run.

python -m farmer_jax.main --config=configs/from_run.py:RUN --workdir=RUN
"""

from farmer_jax import config
from farmer_jax.runtime import workdir


def get_config(run=''):
  """Reads RUN/config.json."""
  if not run:
    raise config.ConfigError('name the run: --config=configs/from_run.py:RUN')
  return config.to_config_dict(config.from_config_dict(workdir.read_config(run)))
