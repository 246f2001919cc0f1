"""Fashion-MNIST, 28×28, class-conditional density estimation (uniform dequantisation).

    python -m farmer_jax.main --config=configs/fashion_mnist.py --config.data.path=FOLDER

FOLDER holds the four IDX .gz files; Debian's package dataset-fashion-mnist puts them in
/usr/share/datasets/fashion-mnist. Without a path TFDS is asked.

Hardware: two CPU cores, about ten minutes. 1.50 million parameters, 700 steps of 128 images:
3.98 bits/dim on the 10,000 test images. With the split into informative and redundant channels,
--config.model.prior.informative_channels=12: 3.95 (1.55 million), but less sharp samples.
"""

from farmer_jax import config


def get_config():
  """The configuration."""
  c = config.defaults()
  c.name = 'fashion_mnist'
  c.data.source = 'fashion_mnist'
  c.data.image_size = 28
  # Half of all pixels are exactly black: docs/benchmarks.md says what that does, and how this
  # helps.
  c.noise.curriculum_std = 0.3
  c.model.patch_size = 4
  c.model.scan_unroll = 6
  c.model.flow.blocks = 3
  c.model.flow.mlp_ratio = 3.0
  c.train.batch_size = 128
  c.train.steps = 700
  c.train.validate_every = 700
  c.train.sample_every = 700
  c.train.optimizer.learning_rate = 5e-3
  return c
