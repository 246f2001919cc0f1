"""The noise models: scales of gray levels, annealing, curriculum, one random key per image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from farmer_jax import config, noise

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8))
UNIFORM = config.Noise(kind='uniform')
CURRICULUM = config.Noise(kind='uniform', curriculum_std=0.4, curriculum_fraction=0.5)
GAUSSIAN = config.Noise(kind='gaussian', std_start=0.1, std_end=0.005)
LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


def test_uniform_noise_fills_the_interval_of_its_level():
  images = jnp.asarray(np.repeat(LEVELS, 256, axis=0))
  x = np.asarray(noise.build(UNIFORM).evaluation_images(KEY, images), np.float64)
  u = (x + 1) * 128 - LEVELS
  assert u.min() > 0 and u.max() < 1
  assert stats.kstest(u.ravel(), 'uniform').pvalue > 1e-3
  # The noise of all levels has the standard deviation of a uniform distribution.
  np.testing.assert_allclose(u.std(0), 12**-0.5, atol=0.04)


@pytest.mark.parametrize('bits', [0, 0x7FFF, 0xC000, 0xFFFF])
def test_uniform_dequantization_is_exact_and_invertible(monkeypatch, bits):
  """Also for the smallest and the largest random numbers, in float32."""
  monkeypatch.setattr(jax.random, 'bits', lambda key, shape, dtype: jnp.full(shape, bits, dtype))
  model = noise.build(UNIFORM)
  x = model.evaluation_images(KEY, jnp.asarray(LEVELS))
  u = (bits // 2 + 0.5) / 2**15
  np.testing.assert_array_equal(np.asarray(x, np.float64), 2 * (LEVELS + u) / 256 - 1)
  np.testing.assert_array_equal(model.quantize(x), LEVELS)


def test_scale_of_gaussian_noise_and_its_inverse():
  model = noise.build(config.Noise(kind='gaussian', std_end=0.0))
  x = model.evaluation_images(KEY, jnp.asarray(LEVELS))
  np.testing.assert_allclose(x, 2 * LEVELS.astype(np.float64) / 255 - 1, atol=1e-7)
  assert x.min() == -1 and x.max() == 1
  np.testing.assert_array_equal(model.quantize(x), LEVELS)
  # A level stays the nearest one up to half the distance to the next.
  for shift in (-0.99 / 255, 0.99 / 255):
    np.testing.assert_array_equal(model.quantize(x + shift), LEVELS)


@pytest.mark.parametrize('std', [0.005, 0.1])
def test_gaussian_noise_has_the_traced_standard_deviation(std):
  model = noise.build(config.Noise(kind='gaussian', std_start=std, std_end=std))
  images = jnp.full((64, 16, 16, 3), 128, jnp.uint8)
  noisy = jax.jit(model.training_images)(KEY, images, 5)
  assert noisy.dtype == jnp.float32
  values = (np.asarray(noisy, np.float64) - (128 / 127.5 - 1)).ravel() / std
  assert stats.kstest(values, 'norm').pvalue > 1e-3


@pytest.mark.parametrize('section', [UNIFORM, GAUSSIAN], ids=lambda n: n.kind)
def test_values_are_float32_also_with_64_bits_and_levels_are_clipped(section):
  model = noise.build(section)
  with jax.enable_x64(True):
    assert model.evaluation_images(KEY, IMAGES).dtype == jnp.float32
  x = jnp.asarray([-jnp.inf, -1e30, -1.001, -1.0, 1.0, 1.001, 1e30, jnp.inf])
  levels = model.quantize(x.reshape(1, 2, 4, 1))
  np.testing.assert_array_equal(levels.ravel(), [0] * 4 + [255] * 4)


def test_gaussian_std_falls_along_half_a_cosine_and_the_curriculum_ends_after_its_fraction():
  std = noise.build(GAUSSIAN, 101).training_std
  np.testing.assert_allclose([std(0), std(50), std(100)], [0.1, 0.0525, 0.005], rtol=1e-6)
  np.testing.assert_allclose(std(25), 0.005 + 0.095 * 0.5 * (1 + np.cos(np.pi / 4)), rtol=1e-6)
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
