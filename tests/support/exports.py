"""Exports of models with random parameters, without a run."""

import farmer_jax
from farmer_jax import config as config_lib
from farmer_jax import exports
from farmer_jax.workdir import layout


def record(config, /, **changes):
  """Returns the content of config.json of an export."""
  return {
    'model_type': 'farmer',
    'export_format': layout.EXPORT_FORMAT,
    'farmer_jax_version': farmer_jax.__version__,
    'step': 3,
    'teacher_step': None,
    'parameters': config.train.evaluated_params,
    'class_names': [],
    'config': config_lib.to_dict(config),
  } | changes


def write(folder, config, params, max_bytes=5e9):
  """Writes an export and returns its folder."""
  exports.write(folder, params, record(config), {}, max_bytes)
  return folder
