"""Handwritten digits, 8×8, class-conditional density estimation (uniform dequantization).

    python -m farmer_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

The dataset contains the 1,797 digits of scikit-learn.

Hardware: two CPU cores, about four minutes.
Result: 4.02 bits/dim on the 180 held-out images.
"""

from ml_collections import ConfigDict

from farmer_jax import config


def get_config() -> ConfigDict:
  """Returns the configuration."""
  c = config.defaults()
  c.name = 'quickstart'
  c.data.source = 'digits'
  # Half of all pixels are exactly black. Without the curriculum, the narrow density of these pixels
  # dominates training, and samples do not resemble digits.
  c.noise.curriculum_std = 0.4
  c.noise.curriculum_fraction = 0.65
  c.model.patch_size = 2
  c.model.patch_basis = 'pixels'
  c.model.flow.blocks = 2
  c.model.flow.layers = 1
  c.model.prior.layers = 4
  c.model.prior.condition_copies = 4
  c.model.prior.components = 32
  c.train.batch_size = 128
  c.train.steps = 800
  c.train.validate_every = 100
  c.train.sample_every = 400
  c.train.checkpoint_every = 400
  # The 1,617 training images are few. Strong weight decay keeps the model from memorizing them, and
  # Muon memorizes them faster than AdamW (docs/recipe.md, "Digits").
  c.train.optimizer.kind = 'adamw'
  c.train.optimizer.learning_rate = 4e-3
  c.train.optimizer.weight_decay = 2.0
  return c
