"""The noise model, which converts uint8 images to the real values whose density is modeled.

`build` returns one of two models, `Uniform` and `Gaussian`, with the same methods. All code that
depends on the kind of noise is in this file.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from farmer_jax import config
from farmer_jax.ops import random
from farmer_jax.ops.arrays import Images, Index, Labels, Scalar, Values


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Uniform dequantization: gray level v is spread over [2v/256 - 1, 2(v + 1)/256 - 1).

  The mean log-density of the result gives an upper bound on the code length of the discrete image
  in bits/dim. A curriculum can add Gaussian noise in the first part of training. Without the noise,
  flat image regions soon have densities hundreds of times narrower than other regions, and their
  gradients dominate. With the noise, the model learns shapes first.
  """

  noise: config.Noise
  steps: int
  later: tuple[config.Schedule, ...] = ()

  has_bits_per_dim = True
  unit = 'bits/dim'
  description = 'uniformly dequantized images: an upper bound on the length of a lossless code'

  def training_std(self, step: Index) -> Float[Array, ''] | None:
    """Returns the standard deviation of the curriculum noise at `step`, or None without one."""
    if not self.noise.curriculum_std:
      return None
    fraction, std = self.noise.curriculum_fraction, self.noise.curriculum_std
    return _scheduled(self, step, lambda steps: _half_cosine(step, std, 0.0, fraction * steps))

  def training_images(self, key: PRNGKeyArray, images: Images, step: Index) -> Values:
    """Returns the inputs of the model at a training step."""
    key_bins, key_noise = jax.random.split(key)
    values, std = self.evaluation_images(key_bins, images), self.training_std(step)
    if std is None:
      return values
    return values + std * jax.random.normal(key_noise, images.shape)

  def evaluation_images(self, key: PRNGKeyArray, images: Images) -> Values:
    """Returns the inputs of the model in evaluation: 2(v + u)/256 - 1 with u ~ U(0, 1).

    u takes the midpoints of a grid of 2^15 steps, so that 255 + u is exact in float32. A finer u
    would sometimes be rounded up into the next interval.
    """
    steps = jax.random.bits(key, images.shape, jnp.uint16) >> 1
    u = (steps.astype(jnp.float32) + 0.5) / 2**15
    return (images.astype(jnp.float32) + u) / 128 - 1

  def quantize(self, values: Values) -> Images:
    """Returns gray levels of real-valued images. Values outside [-1, 1) are clipped."""
    return jnp.clip(jnp.floor((values + 1) * 128), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """Gaussian noise whose standard deviation falls along half a cosine during training.

  It is added to 2v/255 - 1, where black and white are exactly -1 and 1. The density of noisy images
  (arXiv 2510.23588) does not bound a code length. It is reported at the final deviation.
  """

  noise: config.Noise
  steps: int
  later: tuple[config.Schedule, ...] = ()

  has_bits_per_dim = False

  @property
  def unit(self) -> str:
    """The unit of reported densities."""
    return f'nats/dim at σ = {self.noise.std_end:g}'

  @property
  def description(self) -> str:
    """The images whose density is reported."""
    return f'images in [-1, 1] with Gaussian noise of standard deviation {self.noise.std_end:g}'

  def training_std(self, step: Index) -> Float[Array, '']:
    """Returns the standard deviation of the noise at `step`."""
    start, end = self.noise.std_start, self.noise.std_end
    return _scheduled(self, step, lambda steps: _half_cosine(step, start, end, steps))

  def training_images(self, key: PRNGKeyArray, images: Images, step: Index) -> Values:
    """Returns the inputs of the model at a training step."""
    return _add_noise(key, images, self.training_std(step))

  def evaluation_images(self, key: PRNGKeyArray, images: Images) -> Values:
    """Returns the inputs of the model in evaluation: with noise of the final standard deviation."""
    return _add_noise(key, images, self.noise.std_end)

  def quantize(self, values: Values) -> Images:
    """Returns the nearest gray levels of real-valued images. Values outside [-1, 1] are clipped."""
    return jnp.clip(jnp.round((values + 1) * 127.5), 0, 255).astype(jnp.uint8)


NoiseModel = Uniform | Gaussian


def build(
  noise: config.Noise, steps: int = 1, later: tuple[config.Schedule, ...] = ()
) -> NoiseModel:
  """Returns the noise model. Only its `training_*` methods depend on the number of steps.

  From `start` of each of the schedules `later`, the number of steps is the one of this schedule.
  """
  return (Uniform if noise.kind == 'uniform' else Gaussian)(noise, steps, later)


def for_training(settings: config.Config) -> NoiseModel:
  """Returns the noise model with the schedules of a run, see `config.Train.schedules`."""
  first, *later = (s for s in settings.train.schedules if s.kind == 'restretch')
  return build(settings.noise, first.steps, tuple(later))


def evaluation_images(
  model: NoiseModel, images: Images, indices: Labels, seed: int, draw: Index = 0
) -> Values:
  """Returns the inputs of the model in evaluation, with one random key per image.

  The noise of an image depends on the seed, the index of the image in its data source and the
  index of the draw. It does not depend on the batch or on the device.
  """

  def one_image(image: UInt8[Array, 'H W C'], index: Index) -> Float[Array, 'H W C']:
    key = random.named_key(seed, 'evaluation', index, draw)
    return model.evaluation_images(key, image[None])[0]

  return jax.vmap(one_image)(images, indices)


def scaled(images: Images) -> Values:
  """Returns images without noise, on the scale of `Gaussian`: 2v/255 - 1."""
  return images.astype(jnp.float32) / 127.5 - 1


def _add_noise(key: PRNGKeyArray, images: Images, std: Scalar) -> Values:
  noise = jax.random.normal(key, images.shape, jnp.float32)
  return scaled(images) + jnp.asarray(std, jnp.float32) * noise


def _scheduled(
  model: NoiseModel, step: Index, std: Callable[[int], Float[Array, '']]
) -> Float[Array, '']:
  """Returns `std(steps)` for the number of steps that applies at `step`."""
  value = std(model.steps)
  for later in model.later:
    value = jnp.where(step < later.start, value, std(later.steps))
  return value


def _half_cosine(step: Index, start: float, end: float, span: float) -> Float[Array, '']:
  """Decays from `start` at step 0 to `end` at step `span` - 1 along half a cosine."""
  progress = jnp.clip(step / max(span - 1, 1), 0, 1)
  return end + (start - end) * 0.5 * (1 + jnp.cos(math.pi * progress))
