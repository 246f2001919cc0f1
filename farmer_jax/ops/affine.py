"""The elementwise affine step that every flow block applies, and its exact inverse."""

import jax.numpy as jnp


def affine_forward(x, shift, log_scale):  # each [B, N, d]
  """Normalises tokens: z = (x - shift) / exp(log_scale).

  Returns:
    z [B, N, d] and log|det dz/dx| [B], in nats.
  """
  z = (x - shift) * jnp.exp(-log_scale)
  return z, -log_scale.sum((-2, -1))


def affine_inverse(z, shift, log_scale):  # each [..., d]
  """Undoes `affine_forward`: x = z · exp(log_scale) + shift."""
  return z * jnp.exp(log_scale) + shift


def bounded(log_scale, most):
  """`log_scale` where it is negative; what is above 0 approaches `most` (0: no bound).

  Of the two directions only the inverse multiplies by exp(log_scale), T blocks in a row: with a
  bound of b a latent grows by no more than e^(T b) and cannot overflow while T b stays below 80 or
  so. Narrow densities, whose log-scales are negative, stay free. Twice continuously differentiable,
  and 0 stays 0.
  """
  if not most:
    return log_scale
  return jnp.where(log_scale > 0, most * jnp.tanh(log_scale / most), log_scale)
