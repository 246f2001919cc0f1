"""Fashion-MNIST, 28×28, class-conditional density estimation (uniform dequantization).

    python -m farmer_jax.main --config=configs/fashion_mnist.py --config.data.path=FOLDER

FOLDER contains the four IDX .gz files. The Debian package dataset-fashion-mnist installs them in
/usr/share/datasets/fashion-mnist. Without --config.data.path, TFDS provides the dataset.

Hardware: two CPU cores, about ten minutes.
Result: 3.63 and 3.61 bits/dim (two seeds) on the 10,000 test images, with 1.50 million parameters
after 700 steps of 128 images. With redundant channels
(--config.model.prior.informative_channels=12): 3.64 and 3.64. See docs/recipe.md.
"""

from ml_collections import ConfigDict

from farmer_jax import config


def get_config() -> ConfigDict:
  """Returns the configuration."""
  c = config.defaults()
  c.name = 'fashion_mnist'
  c.data.source = 'fashion_mnist'
  c.data.image_size = 28
  # Half of all pixels are exactly black. Without the curriculum, the narrow density of these pixels
  # dominates training (docs/benchmarks.md).
  c.noise.curriculum_std = 0.3
  c.model.patch_size = 4
  c.model.patch_basis = 'pixels'  # In another basis, exactly black pixels are harder to predict.
  c.model.flow.blocks = 3
  c.model.flow.mlp_ratio = 3.0
  c.train.batch_size = 128
  c.train.steps = 700
  c.train.validate_every = 700
  c.train.sample_every = 700
  c.train.optimizer.learning_rate = 6e-3
  return c
