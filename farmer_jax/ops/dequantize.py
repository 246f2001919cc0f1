"""Conversion of gray levels to real numbers and back, on two scales.

Uniform dequantization maps gray level v to the interval [2v/256 - 1, 2(v + 1)/256 - 1). The mean
log-density of the result bounds the code length of the discrete image. Gaussian noise is added to
2v/255 - 1, where black and white are exactly -1 and 1.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, UInt8

from farmer_jax.ops.arrays import Scalar


def dequantize_uniform(
  key: PRNGKeyArray, images: UInt8[Array, '*shape'], dtype: DTypeLike = jnp.float32
) -> Float[Array, '*shape']:
  """Returns 2(v + u)/256 - 1 with u ~ U(0, 1).

  u takes the midpoints of a grid of 2^15 steps, so that 255 + u is exact in float32. A finer u
  would sometimes be rounded up into the next interval.
  """
  steps = jax.random.bits(key, images.shape, jnp.uint16) >> 1
  u = (steps.astype(dtype) + 0.5) / 2**15
  return (images.astype(dtype) + u) / 128 - 1


def dequantize_gaussian(
  key: PRNGKeyArray,
  images: UInt8[Array, '*shape'],
  noise_std: Scalar,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, '*shape']:
  """Returns 2v/255 - 1 + ε with ε ~ N(0, noise_std²)."""
  noise = jax.random.normal(key, images.shape, dtype)
  return images.astype(dtype) / 127.5 - 1 + jnp.asarray(noise_std, dtype) * noise


def quantize(x: Float[Array, '*shape'], kind: str) -> UInt8[Array, '*shape']:
  """Returns gray levels on the scale of `kind`, uniform or gaussian. Clips other values."""
  levels = jnp.floor((x + 1) * 128) if kind == 'uniform' else jnp.round((x + 1) * 127.5)
  return jnp.clip(levels, 0, 255).astype(jnp.uint8)


def psnr(rmse: float) -> float:
  """Converts a root mean square error of values in [-1, 1] to the PSNR in dB."""
  return 20 * math.log10(2 / rmse) if rmse else math.inf
