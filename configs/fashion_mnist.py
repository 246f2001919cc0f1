"""Fashion-MNIST, 28×28, class-conditional density estimation."""

from farmer_jax import config


def get_config():
  """The configuration."""
  c = config.defaults()
  c.name = 'fashion_mnist'
  c.data.source = 'fashion_mnist'
  c.data.image_size = 28
  c.model.patch_size = 4
  c.model.scan_unroll = 3
  c.model.flow.blocks = 3
  c.model.flow.mlp_ratio = 3.0
  c.model.prior.informative_channels = 12
  c.train.batch_size = 128
  c.train.steps = 700
  c.train.validate_every = 700
  c.train.sample_every = 700
  c.train.optimizer.learning_rate = 5e-3
  c.noise.curriculum_std = 0.3
  return c
