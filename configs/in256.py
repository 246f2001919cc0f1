"""ImageNet 256×256, class-conditional: 1.1b-p16, 1.1b-p8, 1.9b-p16, 1.9b-p8, sized as in the paper.

    python -c "import tensorflow_datasets as tfds; \\
      tfds.builder('imagenet2012', file_format='array_record').download_and_prepare()"
    python -m farmer_jax.main --config=configs/in256.py              # 1.1b-p16
    python -m farmer_jax.main --config=configs/in256.py:1.9b-p8

    python -m farmer_jax.main --job=sample --config=configs/from_run.py:RUN --workdir=RUN \\
      --config.sampling.count=50000

The first command prepares the dataset. The last command samples with the published temperatures,
guidance scale and candidates per token. RUN is the workdir of a run.

Hardware: a TPU pod slice or a GPU cluster.
Published result: FID of 50,000 samples with guidance, after 320 epochs: 5.40 (1.1b-p16), 5.02
(1.1b-p8), 3.96 (1.9b-p16), 3.60 (1.9b-p8). These results have not been reproduced with farmer_jax.

The paper does not state the batch size or the gradient clipping. This file uses 1024 and 1.0. The
published model has tokens of pixels (--config.model.patch_basis=pixels), this file the DCT basis.
docs/paper.md lists all differences.
"""

from ml_collections import ConfigDict

from farmer_jax import config, errors

TRAIN_IMAGES = 1_281_167
_EPOCHS = 320

# Flow blocks, layers per flow block, prior layers, prior width.
_SIZES = {'1.1b': (28, 4, 12, 768), '1.9b': (32, 6, 24, 1024)}
_PATCHES = {'p16': 16, 'p8': 8}

# The published guidance: proposal_scale_factor, weighing_logit_factor, weighing_scale_factor and
# scale. All models use 5 + 5 candidates, proposal_logit_factor=1.0 and sharpening=1.1. The number
# of candidates for the redundant channels is not published.
_GUIDANCE = {
  '1.1b-p16': (0.9, 0.2, 0.9, 2.5),
  '1.1b-p8': (1.0, 0.2, 0.9, 2.0),
  '1.9b-p16': (0.9, 0.2, 0.9, 3.5),
  '1.9b-p8': (1.0, 0.1, 1.0, 1.5),
}


def get_config(variant: str = '1.1b-p16') -> ConfigDict:
  """Returns the configuration of a variant <size>-<patch>."""
  size, _, patch = variant.partition('-')
  if size not in _SIZES or patch not in _PATCHES:
    known = ', '.join(f'{s}-{p}' for s in _SIZES for p in _PATCHES)
    raise errors.ConfigError(f'configs/in256.py has no variant {variant!r}; choose one of {known}')
  c = config.defaults()
  c.name = f'in256-{variant}'
  c.data.source = 'imagenet2012'
  c.data.valid_split = 'validation'
  c.data.image_size = 256
  c.data.channels = 3
  c.data.num_classes = 1000
  c.data.flip = True
  # One core prepares 270 images per second (docs/benchmarks.md). At half of peak FLOPS, training
  # 1.1b-p16 needs 2,550 images per second (ten cores) on eight H100s, and 508 (two cores) on eight
  # v5e chips. These workers and threads can use 32 cores.
  c.data.workers = 8
  c.data.threads = 4
  c.data.prefetch = 2
  c.noise.kind = 'gaussian'
  c.model.patch_size = _PATCHES[patch]
  c.model.dtype = 'bfloat16'
  # By the TPU compiler's estimate, this policy is the fastest (docs/scaling.md).
  c.model.remat = 'layers'
  flow, prior = c.model.flow, c.model.prior
  flow.blocks, flow.layers, prior.layers, prior.width = _SIZES[size]
  flow.width = 768
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
  # Muon does not shard its iterations over devices.
  c.train.optimizer.kind = 'adamw'
  # The published rate is 1e-4. Matrices that read hidden states get 128/width of the rate that is
  # set here: 1e-4 for a width of 768, and 7.5e-5 for the prior of the 1.9b models.
  c.train.optimizer.learning_rate = 6e-4
  c.train.optimizer.warmup_steps = 5000
  guidance = c.sampling.guidance
  (
    guidance.proposal_scale_factor,
    guidance.weighing_logit_factor,
    guidance.weighing_scale_factor,
    guidance.scale,
  ) = _GUIDANCE[variant]
  guidance.sharpening = 1.1
  c.sampling.grid_rows = 8
  return c
