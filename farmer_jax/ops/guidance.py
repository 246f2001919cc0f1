"""Draws tokens with guidance.

Guidance draws from p'(z) ∝ p_c(z)^(1 + w) · p_u(z)^(-w). p_c is the mixture given the class, p_u is
the mixture given "no class", and w ≥ 0 is the guidance scale (arXiv 2510.23588). Powers of mixtures
have no closed form. `resample` approximates p' by weighted candidates. `draw_component_product`
replaces p' by a product of two Gaussians, as in GIVT and JetFormer (arXiv 2312.02116, 2411.19722).

All functions draw for one image. `jax.vmap` maps them over a batch. `mixtures` has a leading axis
of S streams: p_c alone (S = 1, no guidance), or p_c and p_u. `scale` is w. `std` and `variance`
multiply the standard deviation and the variance of the proposal.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from farmer_jax import config
from farmer_jax.ops import mixture, random
from farmer_jax.ops.arrays import Scalar


def draw_token(
  key: PRNGKeyArray, mixtures: mixture.Mixture, scale: Scalar, guidance: config.Guidance
) -> Float[Array, 'd']:
  """Draws one token from mixtures [S, K, d]."""
  if len(mixtures.logits) == 1:
    return mixture.sample(key, _proposal(mixtures, guidance))[0]
  if guidance.method == 'component':
    return draw_component_product(key, _proposal(mixtures, guidance), scale)
  sizes = guidance.conditional_candidates, guidance.unconditional_candidates
  return resample(key, mixtures, scale, guidance, sizes)[0]


def draw_shared(
  key: PRNGKeyArray,
  mixtures: mixture.Mixture,
  scale: Scalar,
  guidance: config.Guidance,
  num_tokens: int,
  variance: Scalar = 1.0,
) -> Float[Array, 'N d']:
  """Draws the redundant channels of all tokens of an image from its shared mixtures [S, K, d].

  With resampling, all tokens choose independently from one pool of candidates. With a variance of
  0, each draw is the mean of a component.
  """
  std = variance**0.5
  if len(mixtures.logits) == 1:
    return mixture.sample(key, _proposal(mixtures, guidance, std), (num_tokens,))[0]
  if guidance.method == 'component':
    keys = jax.random.split(key, num_tokens)
    draw = jax.vmap(draw_component_product, (0, None, None, None))
    return draw(keys, _proposal(mixtures, guidance), scale, std)
  sizes = (guidance.redundant_candidates,) * 2
  return resample(key, mixtures, scale, guidance, sizes, num_tokens, std)


def resample(
  key: PRNGKeyArray,
  mixtures: mixture.Mixture,
  scale: Scalar,
  guidance: config.Guidance,
  sizes: tuple[int, int],
  num_draws: int = 1,
  std: Scalar = 1.0,
) -> Float[Array, 'draws d']:
  """Draws candidates from p_c and p_u, and chooses among them by their importance weights for p'.

  The weight of a candidate is p' divided by the density that it was drawn from. Its logarithm is
  w (log p_c - log p_u) for p_c and (w + 1) (log p_c - log p_u) for p_u. As the pools grow, the
  distribution of the chosen candidates approaches p'.

  `guidance` has factors that sharpen the proposal mixtures, the weighing mixtures and the weights.
  `sizes` are the numbers of candidates from p_c and from p_u. `num_draws` is the number of
  independent choices from the pool.
  """
  key_candidates, key_choice = jax.random.split(key)
  proposal = _proposal(mixtures, guidance, std)
  pools = mixture.sample(key_candidates, proposal, (max(sizes),))
  candidates = jnp.concatenate([pool[:size] for pool, size in zip(pools, sizes, strict=True)])
  weighing = mixture.sharpen(
    mixtures, guidance.weighing_logit_factor, guidance.weighing_scale_factor
  )
  # `mixture.log_prob` would need too much memory for large pools and mixtures.
  points = jnp.broadcast_to(candidates, (2, *candidates.shape))
  log_c, log_u = mixture.shared_log_prob(weighing, points)
  powers = scale + (jnp.arange(sum(sizes)) >= sizes[0])
  log_weights = guidance.sharpening * powers * (log_c - log_u)
  return candidates[random.categorical(key_choice, log_weights, (num_draws,))]


def draw_component_product(
  key: PRNGKeyArray, mixtures: mixture.Mixture, scale: Scalar, std: Scalar = 1.0
) -> Float[Array, 'd']:
  """Chooses component k by the weights of p_c, and draws from the guided product of Gaussians k.

  In each channel, the product is Gaussian if its precision (1 + w)/σ_c² - w/σ_u² is positive. The
  other channels use the Gaussian of p_c.
  """
  key_component, key_noise = jax.random.split(key)
  k = random.categorical(key_component, mixtures.logits[0])
  mean_c, mean_u = mixtures.means[:, k]
  precision_c, precision_u = jnp.exp(-2 * mixtures.log_scales[:, k])
  precision = (1 + scale) * precision_c - scale * precision_u
  is_gaussian = precision > 0
  precision = jnp.where(is_gaussian, precision, precision_c)
  product_mean = ((1 + scale) * precision_c * mean_c - scale * precision_u * mean_u) / precision
  mean = jnp.where(is_gaussian, product_mean, mean_c)
  noise = jax.random.normal(key_noise, mean.shape, mean.dtype)
  return mean + std * noise / jnp.sqrt(precision)


def _proposal(
  mixtures: mixture.Mixture, guidance: config.Guidance, std: Scalar = 1.0
) -> mixture.Mixture:
  """Returns the mixtures from which candidates are drawn."""
  scales = guidance.proposal_scale_factor * std
  return mixture.sharpen(mixtures, guidance.proposal_logit_factor, scales)
