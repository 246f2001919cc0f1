"""Bytes to real numbers and back: the two scales of the method, kept apart.

Uniform dequantisation spreads grey level v over the bin [2v/256 - 1, 2(v + 1)/256 - 1): the density
of the result bounds the probability of the image. Gaussian noise is added to levels placed at
2v/255 - 1, so that black and white are exactly -1 and 1.
"""

import math

import jax
import jax.numpy as jnp


def dequantize_uniform(key, images, dtype=jnp.float32):  # uint8 [B, H, W, C]
  """x = 2(v + u)/256 - 1 with u ~ U(0, 1).

  u takes the midpoints of a grid of 2¹⁵ steps, so that 255 + u is exact in float32: a finer u is
  now and then rounded up into the next bin.
  """
  steps = jax.random.bits(key, images.shape, jnp.uint16) >> 1
  u = (steps.astype(dtype) + 0.5) / 2**15
  return (images.astype(dtype) + u) / 128 - 1


def dequantize_gaussian(key, images, noise_std, dtype=jnp.float32):  # uint8 [B, H, W, C]
  """x = 2v/255 - 1 + ε with ε ~ N(0, noise_std²); `noise_std` may be traced."""
  noise = jax.random.normal(key, images.shape, dtype)
  return images.astype(dtype) / 127.5 - 1 + jnp.asarray(noise_std, dtype) * noise


def quantize(x, kind):
  """Nearest grey levels, uint8, on the scale of dequantisation `kind`; out-of-range values
  saturate."""
  levels = jnp.floor((x + 1) * 128) if kind == 'uniform' else jnp.round((x + 1) * 127.5)
  return jnp.clip(levels, 0, 255).astype(jnp.uint8)


def psnr(rmse):
  """Peak signal-to-noise ratio, dB, for a root mean square error of values in [-1, 1]."""
  return 20 * math.log10(2 / rmse) if rmse else math.inf
