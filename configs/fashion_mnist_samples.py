"""Fashion-MNIST, 28×28, class-conditional generation (annealed Gaussian noise, then clean-up).

    python -m farmer_jax.main --config=configs/fashion_mnist_samples.py --config.data.path=FOLDER
    python -m farmer_jax.main --job=sample --config=configs/from_run.py:RUN --workdir=RUN

FOLDER as for configs/fashion_mnist.py, whose model this is. Most pixels are exactly black, and a
density of nearly exact images spends itself on that; with noise that ends at σ = 0.1 the model
learns shapes, and one step up its own score takes the noise away again.

Hardware: two CPU cores, about 25 minutes. 1.50 million parameters, 1,800 steps of 128 images:
-0.494 nats/dim on the 10,000 test images at σ = 0.1. Samples: docs/benchmarks.md, "Guidance".
"""

from configs import fashion_mnist


def get_config():
  """The configuration."""
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
  c.sampling.guidance.scale = 1.0
  return c
