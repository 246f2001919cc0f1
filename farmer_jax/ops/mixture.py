"""Diagonal Gaussian mixtures, float32 or float64: densities and samples.

`lead` are any leading axes: [B, N] for one mixture per token, [B] for one mixture per image.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from farmer_jax.ops import random
from farmer_jax.ops.arrays import PerToken, Scalar, Tokens

LOG_2PI = math.log(2 * math.pi)


@flax.struct.dataclass
class Mixture:
  """A batch of diagonal Gaussian mixtures."""

  logits: Float[Array, '*lead K']  # unnormalized log-weights
  means: Float[Array, '*lead K d']
  log_scales: Float[Array, '*lead K d']  # logarithms of standard deviations


def log_prob(mixture: Mixture, z: Float[Array, '*lead d']) -> Float[Array, '*lead']:
  """Returns the log-density of each point under its own mixture, in nats."""
  components = _normal_log_prob(z[..., None, :], mixture.means, mixture.log_scales)  # [..., K]
  return jax.nn.logsumexp(jax.nn.log_softmax(mixture.logits) + components, axis=-1)


def shared_log_prob(mixture: Mixture, z: Tokens) -> PerToken:
  """Returns the log-density of N tokens under one mixture [B, K, d] per image, in nats.

  The direct form needs arrays [B, N, K, d]. Expanding (z - mean)² / scale² gives two matrix
  products instead, but their terms cancel. In float32, the log-density of a component at distance D
  from the center has an error of about 2e-7 · (D / scale)² nats per channel. For the most likely
  component of each token, the log-density is therefore recomputed in the direct form, which needs
  [B, N, d] numbers. The errors of the other components matter only for tokens that several
  components explain about equally well.
  """
  log_weights = jax.nn.log_softmax(mixture.logits)[:, None]  # [B, 1, K]
  components = log_weights + _expanded_log_probs(mixture, z)  # [B, N, K]
  likeliest = jax.lax.stop_gradient(components).argmax(-1, keepdims=True)  # [B, N, 1]
  means, log_scales = (
    jnp.take_along_axis(a, likeliest, axis=1) for a in (mixture.means, mixture.log_scales)
  )  # [B, N, d]
  exact = jnp.take_along_axis(log_weights, likeliest, axis=-1)[..., 0]
  exact += _normal_log_prob(z, means, log_scales)
  is_likeliest = likeliest == jnp.arange(components.shape[-1])
  return jax.nn.logsumexp(jnp.where(is_likeliest, exact[..., None], components), axis=-1)


def _expanded_log_probs(mixture: Mixture, z: Tokens) -> Float[Array, 'B N K']:
  """Computes log-densities of tokens under each component, by matrix products.

  In each channel, tokens and means are first centered on the average of the means, weighted by
  precision. This center minimizes the sum over components of the squares that cancel.
  """
  weights = jax.nn.softmax(-2 * mixture.log_scales, axis=-2)
  center = jax.lax.stop_gradient((weights * mixture.means).sum(-2, keepdims=True))  # [B, 1, d]
  z, means = z - center, mixture.means - center
  precision = jnp.exp(-2 * mixture.log_scales)  # [B, K, d]
  highest = jax.lax.Precision.HIGHEST
  quadratic = jnp.einsum('bnd,bkd->bnk', z**2, precision, precision=highest)
  cross = jnp.einsum('bnd,bkd->bnk', z, means * precision, precision=highest)
  constant = (0.5 * means**2 * precision + mixture.log_scales + 0.5 * LOG_2PI).sum(-1)  # [B, K]
  return cross - 0.5 * quadratic - constant[:, None]


def sharpen(mixture: Mixture, logit_factor: float, scale_factor: Scalar) -> Mixture:
  """Multiplies the logits and the standard deviations by factors. A factor of 0 gives points."""
  return Mixture(
    mixture.logits * logit_factor, mixture.means, mixture.log_scales + jnp.log(scale_factor)
  )


def sample(
  key: PRNGKeyArray, mixture: Mixture, shape: tuple[int, ...] = ()
) -> Float[Array, '... d']:
  """Draws points [*lead, *shape, d], with `shape` points from each mixture."""
  key_component, key_noise = jax.random.split(key)
  lead, d, draws = mixture.logits.shape[:-1], mixture.means.shape[-1], math.prod(shape)
  component = random.categorical(key_component, mixture.logits, (draws,))  # [*lead, draws]

  def select(a: Float[Array, '*lead K d']) -> Float[Array, '*lead draws d']:
    return jnp.take_along_axis(a, component[..., None], axis=-2)

  noise = jax.random.normal(key_noise, (*lead, draws, d), mixture.means.dtype)
  z = select(mixture.means) + jnp.exp(select(mixture.log_scales)) * noise
  return z.reshape(*lead, *shape, d)


def standard_normal_log_prob(z: Float[Array, '*lead d']) -> Float[Array, '*lead']:
  """Returns log-densities under standard normals in nats, summed over the last axis."""
  return -0.5 * (z**2 + LOG_2PI).sum(-1)


def _normal_log_prob(z: Array, mean: Array, log_scale: Array) -> Array:
  """Returns log-densities under normals in nats, summed over the last axis. Inputs broadcast."""
  scaled = (z - mean) * jnp.exp(-log_scale)
  return -(0.5 * scaled**2 + log_scale).sum(-1) - 0.5 * z.shape[-1] * LOG_2PI
