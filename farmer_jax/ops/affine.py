"""The elementwise affine map of a flow block, and its exact inverse."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from farmer_jax.ops.arrays import PerImage, Tokens

Vectors = Float[Array, '*lead d']


def affine_forward(x: Tokens, shift: Tokens, log_scale: Tokens) -> tuple[Tokens, PerImage]:
  """Returns z = (x - shift) / exp(log_scale), and log|det dz/dx| in nats."""
  z = (x - shift) * jnp.exp(-log_scale)
  return z, -log_scale.sum((-2, -1))


def affine_inverse(z: Vectors, shift: Vectors, log_scale: Vectors) -> Vectors:
  """Returns x = z · exp(log_scale) + shift, the inverse of `affine_forward`."""
  return z * jnp.exp(log_scale) + shift


def bound_log_scale(log_scale: Float[Array, '*shape'], upper: float) -> Float[Array, '*shape']:
  """Applies a smooth upper bound. An `upper` of 0 means no bound.

  Negative values, which mean narrow densities, stay unchanged. Positive values approach `upper`.
  The function is twice continuously differentiable and maps 0 to 0.

  Only the inverse multiplies by exp(log_scale), in T blocks in sequence. With the bound b, a
  latent grows at most by e^(T b), which does not overflow float32 while T b is below about 80.
  """
  if not upper:
    return log_scale
  return jnp.where(log_scale > 0, upper * jnp.tanh(log_scale / upper), log_scale)
