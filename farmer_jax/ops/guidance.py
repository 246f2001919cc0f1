"""Draws tokens with guidance.

Guidance draws from p'(z) ∝ p_c(z)^(1 + w) · p_u(z)^(-w). p_c is the mixture given the class, p_u is
the mixture given "no class", and w ≥ 0 is the guidance scale (arXiv 2510.23588). Powers of mixtures
have no closed form.

The functions draw for one image. `mixtures` has a leading axis of S streams: p_c alone (S = 1, no
guidance), or p_c and p_u. `scale` is w. `std` and `variance` multiply the standard deviation and
the variance of the proposal. Draws come with the effective size of their pool, see `resample`, or
None if they do not choose from a pool.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from farmer_jax import config
from farmer_jax.ops import mixture, random
from farmer_jax.ops.arrays import PerImage, PerToken, Scalar, Tokens

Fraction = Float[Array, ''] | None


@flax.struct.dataclass
class EffectiveSizes:
  """Effective sizes of the pools of resampling, as fractions of the pool sizes. See `resample`."""

  informative: PerToken | None = None  # in the token order of the prior
  redundant: PerImage | None = None


class GuidedDraws:
  """Draws for a batch of images, with one random key per image and one guidance scale per token.

  An image does not depend on the others. `variance` multiplies that of the redundant channels.
  """

  def __init__(
    self, keys: PRNGKeyArray, scales: Float[Array, 'N'], variance: Scalar, guidance: config.Guidance
  ):
    self._informative_keys, self._redundant_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    self._scales, self._variance, self._guidance = scales, variance, guidance

  def token(
    self, mixtures: mixture.Mixture, i: Int[Array, '']
  ) -> tuple[Float[Array, 'B d_I'], PerImage | None]:
    """Draws the informative channels of token i from mixtures [S, B, ...]."""
    return jax.vmap(
      lambda key, m: draw_token(jax.random.fold_in(key, i), m, self._scales[i], self._guidance),
      in_axes=(0, 1),
    )(self._informative_keys, mixtures)

  def shared(
    self, mixtures: mixture.Mixture, num_tokens: int
  ) -> tuple[Float[Array, 'B N d_R'], PerImage | None]:
    """Draws the redundant channels of all tokens from one shared mixture per image, [S, B, ...].

    The guidance scale is the scale of the last token.
    """
    arguments = self._scales[-1], self._guidance, num_tokens, self._variance
    draw = jax.vmap(lambda key, m: draw_shared(key, m, *arguments), in_axes=(0, 1))
    return draw(self._redundant_keys, mixtures)

  def normal(self, num_tokens: int, channels: int) -> Tokens:
    """Draws from a normal distribution with mean 0 and the variance of the redundant channels."""
    draw_one = functools.partial(jax.random.normal, shape=(num_tokens, channels))
    return jnp.sqrt(self._variance) * jax.vmap(draw_one)(self._redundant_keys)


def draw_token(
  key: PRNGKeyArray, mixtures: mixture.Mixture, scale: Scalar, guidance: config.Guidance
) -> tuple[Float[Array, 'd'], Fraction]:
  """Draws one token from mixtures [S, K, d]."""
  if len(mixtures.logits) == 1:
    return mixture.sample(key, _proposal(mixtures, guidance))[0], None
  if guidance.method == 'component':
    return draw_component_product(key, _proposal(mixtures, guidance), scale), None
  sizes = guidance.conditional_candidates, guidance.unconditional_candidates
  draws, fraction = resample(key, mixtures, scale, guidance, sizes)
  return draws[0], fraction


def draw_shared(
  key: PRNGKeyArray,
  mixtures: mixture.Mixture,
  scale: Scalar,
  guidance: config.Guidance,
  num_tokens: int,
  variance: Scalar = 1.0,
) -> tuple[Float[Array, 'N d'], Fraction]:
  """Draws the redundant channels of all tokens of an image from its shared mixtures [S, K, d].

  With resampling, all tokens choose independently from one pool. A variance of 0 draws the means.
  """
  std = variance**0.5
  if len(mixtures.logits) == 1:
    return mixture.sample(key, _proposal(mixtures, guidance, std), (num_tokens,))[0], None
  if guidance.method == 'component':
    keys = jax.random.split(key, num_tokens)
    draw = jax.vmap(draw_component_product, (0, None, None, None))
    return draw(keys, _proposal(mixtures, guidance), scale, std), None
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
) -> tuple[Float[Array, 'draws d'], Float[Array, '']]:
  """Draws candidates from p_c and p_u, and chooses among them by their importance weights for p'.

  The weight of a candidate is p' divided by the density that it was drawn from. Its logarithm is
  w (log p_c - log p_u) for p_c and (w + 1) (log p_c - log p_u) for p_u. As the pools grow, the
  distribution of the chosen candidates approaches p'. `sizes` are the numbers of candidates from
  p_c and from p_u. The `num_draws` choices from the pool are independent.

  Also returns the effective sample size (Σw)²/Σw² of the weights w, divided by the pool size. It is
  1 if all weights are equal. If one weight dominates, all draws are copies of one candidate.
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
  draws = candidates[random.categorical(key_choice, log_weights, (num_draws,))]
  return draws, 1 / (sum(sizes) * (jax.nn.softmax(log_weights) ** 2).sum())


def draw_component_product(
  key: PRNGKeyArray, mixtures: mixture.Mixture, scale: Scalar, std: Scalar = 1.0
) -> Float[Array, 'd']:
  """Chooses component k by the weights of p_c, and draws from the guided product of Gaussians k.

  GIVT and JetFormer replace p' by this product (arXiv 2312.02116, 2411.19722). In each channel, the
  product is Gaussian if its precision (1 + w)/σ_c² - w/σ_u² is positive. The other channels use the
  Gaussian of p_c.
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
  scales = guidance.proposal_scale_factor * std
  return mixture.sharpen(mixtures, guidance.proposal_logit_factor, scales)
