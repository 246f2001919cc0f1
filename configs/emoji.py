"""Emoji, 32×32 or 64×64 RGB, nine classes, generation (annealed Gaussian noise, then denoising).

    python -m benchmarks.emoji --out=EMOJI
    python -m farmer_jax.main --config=configs/emoji.py:32-p8 --config.data.path=EMOJI
"""

from ml_collections import ConfigDict

from farmer_jax import config, errors

# Flow blocks, layers per flow block, prior layers, width, informative channels, batch, steps.
_VARIANTS = {
  '32-p8': (4, 2, 4, 192, 32, 128, 1000),
}


def get_config(variant: str = '32-p8') -> ConfigDict:
  """Returns the configuration of a variant <image size>-p<patch size>."""
  if variant not in _VARIANTS:
    known = ', '.join(_VARIANTS)
    raise errors.ConfigError(f'configs/emoji.py has no variant {variant!r}; choose one of {known}')
  c = config.defaults()
  c.name = f'emoji-{variant}'
  c.data.source = 'folder'
  c.data.channels = 3
  c.data.num_classes = 9
  c.data.image_size, c.model.patch_size = map(int, variant.split('-p')[:2])
  c.noise.kind = 'gaussian'
  c.noise.std_start = 0.3
  c.noise.std_end = 0.1
  flow, prior = c.model.flow, c.model.prior
  flow.blocks, flow.layers, prior.layers, width, informative, batch, steps = _VARIANTS[variant]
  flow.width = prior.width = width
  prior.informative_channels = informative
  prior.components = 32
  prior.redundant_components = 32
  c.train.batch_size = batch
  c.train.steps = steps
  c.train.validate_every = 500
  c.train.sample_every = 500
  c.train.checkpoint_every = 500
  c.sampling.denoise = True
  c.sampling.guidance.scale = 0.5
  return c
