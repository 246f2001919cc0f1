"""Conversion of gray levels to real numbers and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from farmer_jax.ops import dequantize

LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


def test_uniform_noise_fills_the_interval_of_its_level():
  images = jnp.asarray(np.repeat(LEVELS, 256, axis=0))
  x = np.asarray(dequantize.dequantize_uniform(jax.random.key(0), images), np.float64)
  u = (x + 1) * 128 - LEVELS
  assert u.min() > 0 and u.max() < 1
  assert stats.kstest(u.ravel(), 'uniform').pvalue > 1e-3
  # The noise of all levels has the standard deviation of a uniform distribution.
  np.testing.assert_allclose(u.std(0), 12**-0.5, atol=0.04)


@pytest.mark.parametrize('bits', [0, 0x7FFF, 0xC000, 0xFFFF])
def test_uniform_dequantization_is_exact_and_invertible(monkeypatch, bits):
  """Also for the smallest and the largest random numbers, in float32."""
  monkeypatch.setattr(jax.random, 'bits', lambda key, shape, dtype: jnp.full(shape, bits, dtype))
  x = dequantize.dequantize_uniform(jax.random.key(0), jnp.asarray(LEVELS))
  u = (bits // 2 + 0.5) / 2**15
  np.testing.assert_array_equal(np.asarray(x, np.float64), 2 * (LEVELS + u) / 256 - 1)
  np.testing.assert_array_equal(dequantize.quantize(x, 'uniform'), LEVELS)


def test_scale_of_gaussian_dequantization_and_its_inverse():
  x = dequantize.dequantize_gaussian(jax.random.key(0), jnp.asarray(LEVELS), 0.0)
  np.testing.assert_allclose(x, 2 * LEVELS.astype(np.float64) / 255 - 1, atol=1e-7)
  assert x.min() == -1 and x.max() == 1
  np.testing.assert_array_equal(dequantize.quantize(x, 'gaussian'), LEVELS)
  # A level stays the nearest one up to half the distance to the next.
  for shift in (-0.99 / 255, 0.99 / 255):
    np.testing.assert_array_equal(dequantize.quantize(x + shift, 'gaussian'), LEVELS)


@pytest.mark.parametrize('noise_std', [0.005, 0.1])
def test_gaussian_noise_has_the_traced_standard_deviation(noise_std):
  images = jnp.full((64, 16, 16, 3), 128, jnp.uint8)
  noisy = jax.jit(dequantize.dequantize_gaussian)(jax.random.key(1), images, noise_std)
  assert noisy.dtype == jnp.float32
  noise = (np.asarray(noisy, np.float64) - (128 / 127.5 - 1)).ravel() / noise_std
  assert stats.kstest(noise, 'norm').pvalue > 1e-3


@pytest.mark.parametrize('kind', ['uniform', 'gaussian'])
def test_values_out_of_range_are_clipped(kind):
  x = jnp.asarray([-jnp.inf, -1e30, -1.001, -1.0, 1.0, 1.001, 1e30, jnp.inf])
  np.testing.assert_array_equal(dequantize.quantize(x, kind), [0] * 4 + [255] * 4)


@pytest.mark.parametrize('convert', [dequantize.dequantize_uniform, dequantize.dequantize_gaussian])
def test_dtype_argument(convert):
  args = () if convert is dequantize.dequantize_uniform else (0.1,)
  with jax.enable_x64(True):
    x = convert(jax.random.key(0), jnp.asarray(LEVELS), *args, dtype=jnp.float64)
  assert x.dtype == jnp.float64
  # Uniform dequantization is exact in float32. Gaussian noise is not.
  rounded = (np.asarray(x) != np.asarray(x, np.float32)).any()
  assert rounded == (convert is dequantize.dequantize_gaussian)
