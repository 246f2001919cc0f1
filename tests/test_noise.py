"""The noise models: annealing, curriculum, and one random key for each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax import config, noise
from farmer_jax.ops import dequantize

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8))
UNIFORM = config.Noise(kind='uniform')
CURRICULUM = config.Noise(kind='uniform', curriculum_std=0.4, curriculum_fraction=0.5)
GAUSSIAN = config.Noise(kind='gaussian', std_start=0.1, std_end=0.005)


def test_gaussian_std_falls_along_half_a_cosine():
  std = noise.build(GAUSSIAN, 101).training_std
  np.testing.assert_allclose([std(0), std(50), std(100)], [0.1, 0.0525, 0.005], rtol=1e-6)
  np.testing.assert_allclose(std(25), 0.005 + 0.095 * 0.5 * (1 + np.cos(np.pi / 4)), rtol=1e-6)


def test_curriculum_ends_after_its_fraction_of_the_steps():
  std = noise.build(CURRICULUM, 202).training_std
  np.testing.assert_allclose([std(0), std(50), std(100), std(201)], [0.4, 0.2, 0, 0], atol=1e-7)
  assert noise.build(UNIFORM, 202).training_std(0) is None


@pytest.mark.parametrize('section', [UNIFORM, CURRICULUM, GAUSSIAN], ids=lambda n: n.kind)
def test_training_images_have_the_std_of_the_step(section):
  """Values minus the scaled gray levels are the dequantization offset plus Gaussian noise."""
  model = noise.build(section, 100)
  images = jnp.full((4, 64, 64, 1), 100, jnp.uint8)
  for step in (0, 99):
    values = np.asarray(model.training_images(KEY, images, step), np.float64)
    std = float(model.training_std(step) or 0)
    expected = np.hypot(std, 2 / 256 / 12**0.5 if model.has_bits_per_dim else 0)
    np.testing.assert_allclose(values.std(), expected, rtol=0.03)
  evaluated = np.asarray(model.evaluation_images(KEY, images), np.float64)
  final = section.std_end if section.kind == 'gaussian' else 2 / 256 / 12**0.5
  np.testing.assert_allclose(evaluated.std(), final, rtol=0.03)


@pytest.mark.parametrize('section', [UNIFORM, GAUSSIAN], ids=lambda n: n.kind)
def test_evaluation_noise_does_not_depend_on_the_batch(section):
  model, indices = noise.build(section), jnp.arange(6)
  full = noise.evaluation_images(model, IMAGES, indices, seed=3)
  part = noise.evaluation_images(model, IMAGES[4:], indices[4:], seed=3)
  np.testing.assert_array_equal(full[4:], part)
  for other in (
    noise.evaluation_images(model, IMAGES, indices, seed=4),
    noise.evaluation_images(model, IMAGES, indices + 1, seed=3),
    noise.evaluation_images(model, IMAGES, indices, seed=3, draw=1),
  ):
    assert (np.asarray(other) != np.asarray(full)).mean() > 0.9
  np.testing.assert_array_equal(
    model.quantize(full) if section.kind == 'uniform' else model.quantize(IMAGES / 127.5 - 1),
    IMAGES,
  )


def test_only_uniform_dequantization_gives_bits_per_dim():
  assert noise.build(UNIFORM).has_bits_per_dim and noise.build(UNIFORM).unit == 'bits/dim'
  gaussian = noise.build(GAUSSIAN)
  assert not gaussian.has_bits_per_dim and '0.005' in gaussian.unit
  values = jnp.array([[[[-9.0], [1.0]]]])
  np.testing.assert_array_equal(gaussian.quantize(values), dequantize.quantize(values, 'gaussian'))
