"""ImageNet 64×64, unconditional density estimation (uniform dequantization).

    python -c "import tensorflow_datasets as tfds; \\
      tfds.builder('downsampled_imagenet/64x64', file_format='array_record').download_and_prepare()"
    python -m farmer_jax.main --config=configs/in64.py

The first command prepares the dataset. The flow has the published size of TARFlow for this dataset:
patch size 2, 8 flow blocks of 8 layers, width 768. TARFlow has a standard normal prior and tokens
of pixels, and reaches 2.99 bits/dim. This configuration has a mixture prior with 59 million
parameters, in addition to the 460 million of the flow, and tokens in the DCT basis.

Hardware: a TPU pod slice or a GPU node.
Result: none. This configuration has not been trained.
"""

from ml_collections import ConfigDict

from farmer_jax import config


def get_config() -> ConfigDict:
  """Returns the configuration."""
  c = config.defaults()
  c.name = 'in64'
  c.data.source = 'downsampled_imagenet/64x64'
  c.data.valid_split = 'validation'
  c.data.image_size = 64
  c.data.channels = 3
  c.data.num_classes = 0
  c.data.flip = True
  c.data.threads = 16
  c.model.patch_size = 2
  c.model.dtype = 'bfloat16'
  c.model.remat = 'dots'
  c.model.flow.blocks = 8
  c.model.flow.layers = 8
  c.model.flow.width = 768
  c.model.prior.layers = 8
  c.model.prior.width = 768
  c.model.prior.condition_copies = 16
  c.model.prior.components = 64
  c.model.label_dropout = 0.0
  c.train.steps = 200_000
  c.train.batch_size = 768
  c.train.ema_decay = 0.9999
  c.train.optimizer.kind = 'adamw'  # Muon does not shard its iterations over devices.
  c.train.optimizer.learning_rate = 6e-4  # 1e-4 for matrices that read width 768
  c.train.optimizer.warmup_steps = 5000
  c.train.log_every = 100
  c.train.validate_every = 10_000
  c.train.sample_every = 10_000
  c.train.checkpoint_every = 2000
  return c
