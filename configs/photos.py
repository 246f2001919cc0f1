"""A folder of your own images, 64×64 RGB, for generation (annealed Gaussian noise).

    python -m farmer_jax.main --config=configs/photos.py --config.data.path=PHOTOS

PHOTOS holds images (JPEG, PNG, WebP, BMP) of any size; they are resized and cropped to squares.
With one subfolder a class and --config.data.num_classes=<their number> the model learns the classes
too.

Hardware: a GPU for the settings here. On a CPU take a smaller model, for example
--config.data.image_size=32 --config.model.flow.blocks=4 --config.train.steps=2000. Samples start to
look like the photographs once the training loss has flattened; thousands of images are better than
hundreds, which a model of this size learns by heart: compare training and validation loss.
"""

from farmer_jax import config


def get_config():
  """The configuration."""
  c = config.defaults()
  c.name = 'photos'
  c.data.source = 'folder'
  c.data.image_size = 64
  c.data.channels = 3
  c.data.num_classes = 0
  c.data.flip = True
  c.noise.kind = 'gaussian'
  c.model.patch_size = 4
  c.model.flow.blocks = 8
  c.model.flow.layers = 4
  c.model.flow.width = 384
  c.model.prior.layers = 8
  c.model.prior.width = 384
  c.model.prior.condition_copies = 16
  c.model.prior.components = 32
  c.model.prior.informative_channels = 24
  c.model.prior.redundant_components = 64
  c.train.steps = 50_000
  c.train.batch_size = 128
  c.train.optimizer.learning_rate = 3e-4
  c.train.optimizer.warmup_steps = 1000
  c.train.log_every = 50
  c.train.validate_every = 2500
  c.train.sample_every = 2500
  c.train.checkpoint_every = 1000
  return c
