"""Every setting of every job.

Config files start from `defaults()`, an `ml_collections.ConfigDict`, which command-line overrides
change. `from_config_dict` turns it into the frozen dataclass `Config`; the rest of the package sees
only dataclasses.
"""

from farmer_jax.config.checks import check, fidelity_network, step_range
from farmer_jax.config.schema import (
  defaults,
  describe,
  from_config_dict,
  get,
  leaves,
  to_config_dict,
  to_dict,
  unknown_key,
)
from farmer_jax.config.sections import (
  Compile,
  Config,
  Data,
  Distill,
  Fidelity,
  Flow,
  Guidance,
  Likelihood,
  Mesh,
  Model,
  Noise,
  Optimizer,
  Prior,
  Profile,
  Sampling,
  Train,
)

__all__ = [
  'Compile',
  'Config',
  'Data',
  'Distill',
  'Fidelity',
  'Flow',
  'Guidance',
  'Likelihood',
  'Mesh',
  'Model',
  'Noise',
  'Optimizer',
  'Prior',
  'Profile',
  'Sampling',
  'Train',
  'check',
  'defaults',
  'describe',
  'fidelity_network',
  'from_config_dict',
  'get',
  'leaves',
  'step_range',
  'to_config_dict',
  'to_dict',
  'unknown_key',
]
