"""Emoji, 32×32 or 64×64 RGB, nine classes, generation (annealed Gaussian noise, then denoising).

    python -m benchmarks.emoji --out=EMOJI
    python -m farmer_jax.main --config=configs/emoji.py --config.data.path=EMOJI            # 32-p8
    python -m farmer_jax.main --config=configs/emoji.py:64-p4-gpu --config.data.path=EMOJI

A variant is <image size>-p<patch size>. All variants have redundant channels: 32-p8 has tokens of
192 channels, of which 32 are informative.

Hardware: one CPU core, about 25 minutes (32-p8). 64-p4-gpu needs a GPU.
Result of 32-p8: -0.446 nats/dim on 732 images of held-out emoji at σ = 0.1, with 8.17 million
parameters after 1,000 steps of 128 images. A classifier recognizes the category of 0.77 of the
guided samples, and of 0.79 of the held-out images: docs/benchmarks.md, "Emoji". The other variants
have not been trained. 32-p4 and 64-p8 should take two to five times as long as 32-p8.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from farmer_jax import config, errors


class _Variant(NamedTuple):
  blocks: int
  layers: int  # of a flow block
  prior_layers: int
  width: int
  informative_channels: int
  batch_size: int
  steps: int


_VARIANTS = {
  '32-p8': _Variant(4, 2, 4, 192, 32, 128, 1000),
  '32-p4': _Variant(4, 2, 4, 128, 16, 128, 1000),
  '64-p8': _Variant(4, 2, 4, 192, 32, 128, 1500),
  '64-p4-gpu': _Variant(8, 4, 8, 384, 16, 256, 10_000),
}


def get_config(variant: str = '32-p8') -> ConfigDict:
  """Returns the configuration of a variant."""
  if variant not in _VARIANTS:
    known = ', '.join(_VARIANTS)
    raise errors.ConfigError(f'configs/emoji.py has no variant {variant!r}; choose one of {known}')
  sizes, (image_size, patch) = _VARIANTS[variant], variant.split('-')[:2]
  c = config.defaults()
  c.name = f'emoji-{variant}'
  c.data.source = 'folder'
  c.data.image_size = int(image_size)
  c.data.channels = 3
  c.data.num_classes = 9
  # The background of all images is exactly white. With this noise, the model learns shapes.
  c.noise.kind = 'gaussian'
  c.noise.std_start = 0.3
  c.noise.std_end = 0.1
  c.model.patch_size = int(patch[1:])
  flow, prior = c.model.flow, c.model.prior
  flow.blocks, flow.layers, prior.layers = sizes.blocks, sizes.layers, sizes.prior_layers
  flow.width = prior.width = sizes.width
  prior.informative_channels = sizes.informative_channels
  prior.components = 32
  prior.redundant_components = 32
  if variant.endswith('gpu'):
    c.model.dtype = 'bfloat16'
    c.train.ema_decay = 0.999
  c.train.batch_size = sizes.batch_size
  c.train.steps = sizes.steps
  c.train.validate_every = sizes.steps // 4
  c.train.sample_every = sizes.steps // 4
  c.train.checkpoint_every = sizes.steps // 4
  c.sampling.denoise = True
  c.sampling.guidance.scale = 0.5
  return c
