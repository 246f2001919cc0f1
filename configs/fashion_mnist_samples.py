"""Fashion-MNIST, 28×28, class-conditional generation (annealed Gaussian noise, then denoising).

    python -m farmer_jax.main --config=configs/fashion_mnist_samples.py --config.data.path=FOLDER
    python -m farmer_jax.main --job=sample --config=configs/from_run.py:RUN --workdir=RUN

FOLDER and the model are the same as in configs/fashion_mnist.py. RUN is the workdir of the first
command.

Half of all pixels are exactly black. Without noise, the model spends most of its capacity on these
pixels. With a final noise of σ = 0.1, the model learns shapes. Sampling removes the noise with one
denoising step along the gradient of the log-density.

Hardware: two CPU cores, about 25 minutes.
Result: -0.527 nats/dim on the 10,000 test images at σ = 0.1, with 1.50 million parameters after
1,800 steps of 128 images. Fréchet distance of 5,000 guided samples 6.7, in the features of a small
classifier: docs/benchmarks.md, "Guidance".
"""

from ml_collections import ConfigDict

from farmer_jax.configs import fashion_mnist


def get_config() -> ConfigDict:
  """Returns the configuration."""
  c = fashion_mnist.get_config()
  c.name = 'fashion_mnist_samples'
  c.noise.kind = 'gaussian'
  c.noise.std_start = 0.3
  c.noise.std_end = 0.1
  c.noise.curriculum_std = 0.0
  c.train.steps = 1800
  c.train.validate_every = 600
  c.train.sample_every = 600
  c.train.checkpoint_every = 300
  c.train.optimizer.learning_rate = 3e-3
  c.sampling.denoise = True
  c.sampling.guidance.scale = 0.5
  return c
