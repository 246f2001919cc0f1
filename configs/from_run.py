"""The configuration that a run was made with, for other jobs on that run.

python -m farmer_jax.main --config=configs/from_run.py:RUN --workdir=RUN
"""

from farmer_jax import config, errors
from farmer_jax.workdir import layout


def get_config(run=''):
  """Reads RUN/config.json."""
  if not run:
    raise errors.ConfigError('name the run: --config=configs/from_run.py:RUN')
  return config.to_config_dict(config.from_config_dict(layout.read_config(run)))
