"""The paper's class-conditional ImageNet-256 models: 1.1b-p16, 1.1b-p8, 1.9b-p16 and 1.9b-p8.

    python -c "import tensorflow_datasets as tfds; \\
      tfds.builder('imagenet2012', file_format='array_record').download_and_prepare()"
    python -m farmer_jax.main --config=configs/in256.py              # 1.1b-p16
    python -m farmer_jax.main --config=configs/in256.py:1.9b-p8

    python -m farmer_jax.main --job=sample --config=configs/from_run.py:RUN --workdir=RUN \\
      --config.sampling.count=50000

The last command samples with the published guidance, whose settings stand below.

Hardware: a TPU pod slice or a GPU cluster. Published FID of 50,000 samples with guidance, after 320
epochs: 5.40 (1.1b-p16), 5.02 (1.1b-p8), 3.96 (1.9b-p16), 3.60 (1.9b-p8). None of these runs has
been repeated with this code yet.

Batch size and clipping are not published; 1024 and 1.0 are this project's choice.
"""

from farmer_jax import config, errors

TRAIN_IMAGES = 1_281_167
_EPOCHS = 320

# Flow blocks, layers a block; prior layers, prior width.
_SIZES = {'1.1b': (28, 4, 12, 768), '1.9b': (32, 6, 24, 1024)}
_PATCHES = {'p16': 16, 'p8': 8}

# The published guidance: proposal_scales, weighing_logits, weighing_scales, scale. Common to all:
# 5 + 5 candidates, proposal_logits 1.0, sharpening 1.1.
_GUIDANCE = {
  '1.1b-p16': (0.9, 0.2, 0.9, 2.5),
  '1.1b-p8': (1.0, 0.2, 0.9, 2.0),
  '1.9b-p16': (0.9, 0.2, 0.9, 3.5),
  '1.9b-p8': (1.0, 0.1, 1.0, 1.5),
}


def get_config(variant='1.1b-p16'):
  """The configuration of `variant`, <size>-<patch>."""
  size, _, patch = variant.partition('-')
  if size not in _SIZES or patch not in _PATCHES:
    known = ', '.join(f'{s}-{p}' for s in _SIZES for p in _PATCHES)
    raise errors.ConfigError(f'configs/in256.py has no variant {variant!r}; it has {known}')
  c = config.defaults()
  c.name = f'in256-{variant}'
  c.data.source = 'imagenet2012'
  c.data.valid_split = 'validation'
  c.data.image_size = 256
  c.data.channels = 3
  c.data.num_classes = 1000
  c.data.flip = True
  # A core prepares 280 images a second (docs/benchmarks.md, Input). Eight H100s at half their peak
  # take 2,600 of 1.1b-p16, eight v5e chips 500: nine cores, or two. This is room for twice that.
  c.data.workers = 8
  c.data.threads = 4
  c.data.prefetch = 2
  c.noise.kind = 'gaussian'
  c.model.patch_size = _PATCHES[patch]
  c.model.dtype = 'bfloat16'
  c.model.remat = 'layers'  # the fastest, and nearly the smallest: docs/scaling.md
  flow, prior = c.model.flow, c.model.prior
  flow.blocks, flow.layers, prior.layers, prior.width = _SIZES[size]
  flow.width = 768
  c.model.scan_unroll = flow.layers  # 2 % faster, for 1.4 times the compiling
  prior.condition_copies = 64
  prior.components = 64
  prior.informative_channels = 128
  prior.redundant_components = 200
  c.train.batch_size = 1024
  c.train.steps = _EPOCHS * TRAIN_IMAGES // c.train.batch_size
  c.train.log_every = 100
  c.train.validate_every = 10_000
  c.train.sample_every = 10_000
  c.train.checkpoint_every = 2000
  c.train.optimizer.learning_rate = 1e-4
  c.train.optimizer.warmup_steps = 5000
  guidance = c.sampling.guidance
  scales, weighing_logits, weighing_scales, scale = _GUIDANCE[variant]
  guidance.proposal_scales = scales
  guidance.weighing_logits = weighing_logits
  guidance.weighing_scales = weighing_scales
  guidance.scale = scale
  guidance.sharpening = 1.1
  c.sampling.max_classes = 8
  return c
