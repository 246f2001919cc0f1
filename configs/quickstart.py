"""Handwritten digits, 8×8, class-conditional: minutes on a laptop.

    python -m farmer_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from farmer_jax import config


def get_config():
  """The 1,797 digits of scikit-learn under uniform dequantisation."""
  c = config.defaults()
  c.name = 'quickstart'
  c.data.source = 'digits'
  c.model.patch_size = 2
  c.model.flow.blocks = 2
  c.model.flow.layers = 1
  c.model.prior.layers = 3
  c.model.prior.condition_copies = 4
  c.model.scan_unroll = 3
  c.train.batch_size = 128
  c.train.steps = 800
  c.train.ema_decay = 0.98
  c.train.optimizer.learning_rate = 3e-3
  c.train.optimizer.weight_decay = 0.1
  c.train.validate_every = 200
  c.train.sample_every = 200
  c.train.checkpoint_every = 200
  return c
