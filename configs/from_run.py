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
      'no workdir in --config=configs/from_run.py; add one: --config=configs/from_run.py:RUN'
    )
  return config.to_config_dict(config.from_config_dict(layout.read_config(run)))
