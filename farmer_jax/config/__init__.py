"""The configuration: all keys of all jobs.

Configuration files start from `defaults()`, an `ml_collections.ConfigDict`. Command-line overrides
modify it. `from_config_dict` converts it to the frozen dataclass `Config`, which all others use.
"""

from farmer_jax.config.checks import check, guidance_scales, step_range
from farmer_jax.config.renames import upgrade
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
from farmer_jax.config.sections import Config
from farmer_jax.config.sections.evaluation import Export, Fidelity, Guidance, Likelihood, Sampling
from farmer_jax.config.sections.model import Data, Flow, Model, Noise, Prior
from farmer_jax.config.sections.training import (
  Compile,
  Distill,
  Mesh,
  Optimizer,
  Profile,
  Schedule,
  Tracker,
  Train,
)
