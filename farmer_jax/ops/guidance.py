"""Drawing tokens under guidance.

Guidance asks for draws from p'(z) ∝ p_c(z)^(1 + w) · p_u(z)^(-w), where p_c is the mixture for the
class, p_u the one for "no class" and w ≥ 0 the guidance scale (arXiv 2510.23588). Mixtures have no
such power in closed form. `resample` approaches p' by weighing candidates; `component` replaces it
by a product of two Gaussians, as GIVT and JetFormer do (arXiv 2312.02116, 2411.19722).

All functions here draw for one image; `jax.vmap` makes batches. `mixtures` has a leading axis S:
p_c alone (S = 1, no guidance), or p_c and p_u. `settings` is `config.Guidance`.
"""

import jax
import jax.numpy as jnp

from farmer_jax.ops import mixture, random


def draw_token(key, mixtures, scale, settings):  # mixtures [S, K, d]
  """Draws one token, [d]."""
  if len(mixtures.logits) == 1:
    return mixture.sample(key, _proposal(mixtures, settings))[0]
  if settings.method == 'component':
    return component(key, _proposal(mixtures, settings), scale)
  sizes = settings.conditional_candidates, settings.unconditional_candidates
  return resample(key, mixtures, scale, settings, sizes)[0]


def draw_shared(key, mixtures, scale, settings, tokens, variance=1.0):  # mixtures [S, K, d]
  """Draws the redundant channels [N, d] of an image's N tokens from its shared mixture.

  Under resampling all tokens pick, independently, from one pool. `variance` multiplies that of
  what is drawn: at 0 each draw is the mean of a component.
  """
  spread = variance**0.5
  if len(mixtures.logits) == 1:
    return mixture.sample(key, _proposal(mixtures, settings, spread), (tokens,))[0]
  if settings.method == 'component':
    keys = jax.random.split(key, tokens)
    draw = jax.vmap(component, (0, None, None, None))
    return draw(keys, _proposal(mixtures, settings), scale, spread)
  sizes = (settings.redundant_candidates,) * 2
  return resample(key, mixtures, scale, settings, sizes, tokens, spread)


def resample(key, mixtures, scale, settings, sizes, picks=1, spread=1.0):
  """Draws candidates from both mixtures and picks among them by their importance for p'.

  The weight of a candidate is p' over the density that it came from: w (log p_c - log p_u) if that
  was p_c, (w + 1) (log p_c - log p_u) if it was p_u. As the pools grow the picks follow p'.

  Args:
    key: random key.
    mixtures: p_c and p_u, [2, K, d].
    scale: w, may be traced.
    settings: `config.Guidance`; how to sharpen the mixtures that propose, those that weigh, and
      the choice.
    sizes: candidates from p_c and from p_u.
    picks: independent picks from the pool.
    spread: factor on the standard deviations of the candidates.

  Returns:
    [picks, d].
  """
  key_pool, key_pick = jax.random.split(key)
  pools = mixture.sample(key_pool, _proposal(mixtures, settings, spread), (max(sizes),))
  candidates = jnp.concatenate([pool[:size] for pool, size in zip(pools, sizes, strict=True)])
  weighing = mixture.sharpened(mixtures, settings.weighing_logits, settings.weighing_scales)
  # As matrix products: a large pool times many components would not fit in memory otherwise.
  both = jnp.broadcast_to(candidates, (2, *candidates.shape))
  log_c, log_u = mixture.shared_log_prob(weighing, both)
  powers = scale + (jnp.arange(sum(sizes)) >= sizes[0])
  log_weights = settings.sharpening * powers * (log_c - log_u)
  return candidates[random.categorical(key_pick, log_weights, (picks,))]


def component(key, mixtures, scale, spread=1.0):  # mixtures [2, K, d]
  """Picks component k by the weights of p_c and draws from the guided product of the k-th
  Gaussians.

  That is Gaussian in each channel where its precision (1 + w)/σ_c² - w/σ_u² is positive; elsewhere
  p_c's Gaussian takes its place. Returns [d].
  """
  key_component, key_noise = jax.random.split(key)
  k = random.categorical(key_component, mixtures.logits[0])
  mean_c, mean_u = mixtures.means[:, k]
  precision_c, precision_u = jnp.exp(-2 * mixtures.log_scales[:, k])
  precision = (1 + scale) * precision_c - scale * precision_u
  proper = precision > 0
  precision = jnp.where(proper, precision, precision_c)
  product = ((1 + scale) * precision_c * mean_c - scale * precision_u * mean_u) / precision
  mean = jnp.where(proper, product, mean_c)
  noise = jax.random.normal(key_noise, mean.shape, mean.dtype)
  return mean + spread * noise / jnp.sqrt(precision)


def _proposal(mixtures, settings, spread=1.0):
  """The mixtures that are drawn from."""
  scales = settings.proposal_scales * spread
  return mixture.sharpened(mixtures, settings.proposal_logits, scales)
