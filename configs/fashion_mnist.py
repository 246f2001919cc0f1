"""Fashion-MNIST, 28×28, class-conditional density estimation."""

from farmer_jax import config


def get_config():
  """The configuration."""
  c = config.defaults()
  c.name = 'fashion_mnist'
  c.data.source = 'fashion_mnist'
  c.data.image_size = 28
  c.model.patch_size = 4
  c.model.flow.width = c.model.prior.width = 128
  c.train.batch_size = 128
  c.train.steps = 700
  return c
