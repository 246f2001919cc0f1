"""A folder of images, 64×64 RGB, generation (annealed Gaussian noise).

    python -m farmer_jax.main --config=configs/photos.py --config.data.path=PHOTOS

PHOTOS contains images (JPEG, PNG, WebP, BMP) of any size. They are resized and cropped to squares.
To train a class-conditional model, put the images of each class into a subfolder, and set
--config.data.num_classes to the number of subfolders.

Hardware: a GPU. On a CPU, use a smaller model, for example
--config.data.image_size=32 --config.model.flow.blocks=4 --config.train.steps=2000. Samples start to
resemble the photos when the training loss decreases only slowly. Use thousands of images. A model
of this size memorizes a dataset of hundreds of images: the validation loss increases while the
training loss decreases.
Result: none. This configuration has not been trained. configs/photo_crops.py and configs/emoji.py
have results for small images.
"""

from ml_collections import ConfigDict

from farmer_jax import config


def get_config() -> ConfigDict:
  """Returns the configuration."""
  c = config.defaults()
  c.name = 'photos'
  c.data.source = 'folder'
  c.data.image_size = 64
  c.data.channels = 3
  c.data.num_classes = 0
  c.data.flip = True
  c.noise.kind = 'gaussian'
  c.model.patch_size = 4
  c.model.neighborhood = True
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
  c.train.optimizer.learning_rate = 1e-3
  c.train.optimizer.warmup_steps = 1000
  c.train.log_every = 50
  c.train.validate_every = 2500
  c.train.sample_every = 2500
  c.train.checkpoint_every = 1000
  return c
