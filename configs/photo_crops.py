"""Crops of photographs, RGB, unconditional density estimation (uniform dequantization).

    python -m benchmarks.photo_crops --out=CROPS
    python -m farmer_jax.main --config=configs/photo_crops.py --config.data.path=CROPS
    python -m benchmarks.photo_crops --out=CROPS64 --size=64
    python -m farmer_jax.main --config=configs/photo_crops.py:64-p8 --config.data.path=CROPS64

A small dataset of natural images, on which changes of the model and of training can be compared in
minutes. No photograph has crops in both splits. A variant is <image size>-p<patch size>;
the default is 32-p4.

Hardware: one CPU core, about five minutes (32-p4) or ten (64-p8).
Result: 3.01 (32-p4) and 3.03 bits/dim (64-p8) on 850 crops of 5 held-out photographs, with 2.24 and
7.31 million parameters, after 250 steps of 64 images, and 2.83 (32-p4) after 1,800 (docs/recipe.md,
"Photo crops").
"""

from ml_collections import ConfigDict

from farmer_jax import config, errors

# Width, informative channels.
_VARIANTS = {'32-p4': (128, 24), '64-p8': (192, 96)}


def get_config(variant: str = '32-p4') -> ConfigDict:
  """Returns the configuration of a variant."""
  if variant not in _VARIANTS:
    raise errors.ConfigError(
      f'configs/photo_crops.py has no variant {variant!r}; choose one of {", ".join(_VARIANTS)}'
    )
  c = config.defaults()
  c.name = f'photo_crops-{variant}'
  c.data.source = 'folder'
  image_size, patch = variant.split('-p')
  c.data.image_size = int(image_size)
  c.data.channels = 3
  c.data.num_classes = 0
  c.model.patch_size = int(patch)
  c.model.label_dropout = 0.0
  c.model.neighborhood = True
  c.model.flow.blocks = 3
  c.model.flow.width = c.model.prior.width = _VARIANTS[variant][0]
  c.model.prior.informative_channels = _VARIANTS[variant][1]
  c.train.steps = 250
  c.train.batch_size = 64
  c.train.validate_every = 250
  c.train.sample_every = 250
  c.train.checkpoint_every = 250
  c.train.valid_batch_size = 50
  c.train.optimizer.learning_rate = 3e-3
  c.train.optimizer.warmup_steps = 20
  return c
