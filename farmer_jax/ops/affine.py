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
