"""Crops of photographs, 32×32 RGB, unconditional density estimation (uniform dequantization).

    python -m benchmarks.photo_crops --out=CROPS
    python -m farmer_jax.main --config=configs/photo_crops.py --config.data.path=CROPS

A small dataset of natural images, on which changes of the model and of training can be compared in
minutes. No photograph has crops in both splits.
"""

from ml_collections import ConfigDict

from farmer_jax import config


def get_config() -> ConfigDict:
  """Returns the configuration."""
  c = config.defaults()
  c.name = 'photo_crops'
  c.data.source = 'folder'
  c.data.image_size = 32
  c.data.channels = 3
  c.data.num_classes = 0
  c.model.patch_size = 4
  c.model.label_dropout = 0.0
  c.model.flow.blocks = 3
  c.train.steps = 250
  c.train.batch_size = 64
  c.train.validate_every = 250
  c.train.sample_every = 250
  c.train.checkpoint_every = 250
  c.train.valid_batch_size = 50
  c.train.optimizer.learning_rate = 3e-3
  c.train.optimizer.warmup_steps = 20
  return c
