"""Diagonal Gaussian mixtures: densities and samples.

A mixture over d channels is three arrays whose leading axes ([B, N] for one mixture a token, [B]
for one an image) are shared. All arithmetic happens in the dtype of those arrays, which the heads
make at least float32.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

from farmer_jax.ops import random

LOG_2PI = math.log(2 * math.pi)


@flax.struct.dataclass
class Mixture:
  """A batch of diagonal Gaussian mixtures with K components over d channels."""

  logits: jax.Array  # [..., K], unnormalised log-weights
  means: jax.Array  # [..., K, d]
  log_scales: jax.Array  # [..., K, d], logarithms of standard deviations


def log_prob(mixture, z):  # z [..., d]
  """Log-density of `z` under a mixture of its own; nats, [...]."""
  components = _normal_log_prob(z[..., None, :], mixture.means, mixture.log_scales)  # [..., K]
  return jax.nn.logsumexp(jax.nn.log_softmax(mixture.logits) + components, axis=-1)


def shared_log_prob(mixture, z):  # mixture [B, K, d], z [B, N, d]
  """Log-density of N tokens under the one mixture of their image; nats, [B, N].

  The direct form would need [B, N, K, d] numbers. Expanding (z - mean)² / scale² turns it into two
  matrix products, whose terms cancel: in float32 the log-density of a component that lies `spread`
  away from the centre errs by about 2e-7 · (spread / scale)² nats a channel. That of each token's
  likeliest component is therefore computed anew, directly, at the cost of [B, N, d] numbers. The
  errors of the others matter only to tokens that several components explain about equally well, and
  for those the centre is chosen near the narrow components.
  """
  log_weights = jax.nn.log_softmax(mixture.logits)[:, None]  # [B, 1, K]
  components = log_weights + _expanded_log_probs(mixture, z)  # [B, N, K]
  likeliest = jax.lax.stop_gradient(components).argmax(-1, keepdims=True)  # [B, N, 1]
  means, log_scales = (
    jnp.take_along_axis(a, likeliest, axis=1) for a in (mixture.means, mixture.log_scales)
  )  # [B, N, d]
  exact = jnp.take_along_axis(log_weights, likeliest, axis=-1)[..., 0]
  exact += _normal_log_prob(z, means, log_scales)
  picked = likeliest == jnp.arange(components.shape[-1])
  return jax.nn.logsumexp(jnp.where(picked, exact[..., None], components), axis=-1)


def _expanded_log_probs(mixture, z):  # mixture [B, K, d], z [B, N, d]
  """Log-densities of tokens under each component, [B, N, K], by matrix products.

  Tokens and means are first centred, channel by channel, on the mean of the means weighted by
  their precisions: the sum over components of the squares that cancel is then the least.
  """
  weights = jax.nn.softmax(-2 * mixture.log_scales, axis=-2)
  centre = jax.lax.stop_gradient((weights * mixture.means).sum(-2, keepdims=True))  # [B, 1, d]
  z, means = z - centre, mixture.means - centre
  precision = jnp.exp(-2 * mixture.log_scales)  # [B, K, d]
  highest = jax.lax.Precision.HIGHEST
  quadratic = jnp.einsum('bnd,bkd->bnk', z**2, precision, precision=highest)
  cross = jnp.einsum('bnd,bkd->bnk', z, means * precision, precision=highest)
  constant = (0.5 * means**2 * precision + mixture.log_scales + 0.5 * LOG_2PI).sum(-1)  # [B, K]
  return cross - 0.5 * quadratic - constant[:, None]


def sharpened(mixture, logits, scales):
  """The mixture with its logits and its components' standard deviations multiplied; 0 scales make
  points of the components, from which one may only sample."""
  return Mixture(mixture.logits * logits, mixture.means, mixture.log_scales + jnp.log(scales))


def sample(key, mixture, shape=()):
  """Draws from each mixture; returns [..., *shape, d] for a mixture with leading axes [...]."""
  key_component, key_noise = jax.random.split(key)
  lead, d = mixture.logits.shape[:-1], mixture.means.shape[-1]
  draws = math.prod(shape)
  component = random.categorical(key_component, mixture.logits, (draws,))  # [..., draws]

  def pick(parameters):
    return jnp.take_along_axis(parameters, component[..., None], axis=-2)

  noise = jax.random.normal(key_noise, (*lead, draws, d), mixture.means.dtype)
  z = pick(mixture.means) + jnp.exp(pick(mixture.log_scales)) * noise
  return z.reshape(*lead, *shape, d)


def standard_normal_log_prob(z):
  """Log-density under independent standard normals; nats, summed over the last axis."""
  return -0.5 * (z**2 + LOG_2PI).sum(-1)


def _normal_log_prob(z, mean, log_scale):  # [..., d] each, which broadcast
  """Log-density under independent normals; nats, summed over the last axis."""
  scaled = (z - mean) * jnp.exp(-log_scale)
  return -(0.5 * scaled**2 + log_scale).sum(-1) - 0.5 * z.shape[-1] * LOG_2PI
