"""Loads the saved configuration of an existing run, for other jobs on that run.

    python -m farmer_jax.main --job=sample --config=configs/from_run.py:RUN --workdir=RUN

RUN is the workdir of the run.
"""

from ml_collections import ConfigDict

from farmer_jax import config, errors
from farmer_jax.workdir import layout


def get_config(run: str = '') -> ConfigDict:
  """Returns the configuration in RUN/config.json."""
  if not run:
    raise errors.ConfigError(
      'no workdir in --config=from_run; add the workdir of a run: --config=from_run:RUN'
    )
  return config.to_config_dict(config.from_config_dict(layout.read_config(run)))
