"""Guided draws against the guided density, integrated numerically in one dimension."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from farmer_jax import config
from farmer_jax.ops import guidance, mixture

DRAWS = 200_000
# p_c and p_u: weights, means, standard deviations.
CONDITIONAL = ([0.6, 0.3, 0.1], [-1.0, 1.2, 3.0], [0.5, 0.7, 0.4])
UNCONDITIONAL = ([0.3, 0.4, 0.3], [-1.2, 0.8, 2.5], [0.9, 1.2, 1.0])
EDGES = np.linspace(-5, 6, 56)
PLAIN = config.Guidance()


@pytest.fixture(autouse=True, scope='module')
def _fast(optimized):
  """The many draws take longer than compiling well."""
  with optimized():
    yield


def make_mixture(parts):
  weights, means, scales = (jnp.asarray(part, jnp.float32) for part in parts)
  return mixture.Mixture(jnp.log(weights) + 0.7, means[:, None], jnp.log(scales)[:, None])


MIXTURES = jax.tree.map(
  lambda c, u: jnp.stack([c, u]), *map(make_mixture, (CONDITIONAL, UNCONDITIONAL))
)


def log_density(parts, x, logits=1.0, scales=1.0):
  weights, means, sigmas = (np.asarray(part) for part in parts)
  log_weights = special.log_softmax(logits * np.log(weights))
  components = stats.norm.logpdf(x[..., None], means, scales * sigmas)
  return special.logsumexp(log_weights + components, axis=-1)


def bin_probabilities(log_unnormalised):
  """Of the bins between EDGES and of the two tails, by quadrature."""

  def mass(low, high):
    x = np.linspace(low, high, 401)
    return integrate.simpson(np.exp(log_unnormalised(x)), x=x)

  edges = np.concatenate([[-12.0], EDGES, [14.0]])
  masses = np.asarray([mass(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)])
  return masses / masses.sum()


def guided_log_density(x, scale, **sharpening):
  log_c, log_u = (log_density(p, x, **sharpening) for p in (CONDITIONAL, UNCONDITIONAL))
  return log_c + scale * (log_c - log_u)


def total_variation(draws, probabilities):
  counts = np.histogram(draws, np.concatenate([[-np.inf], EDGES, [np.inf]]))[0]
  return 0.5 * abs(counts / counts.sum() - probabilities).sum()


@functools.partial(jax.jit, static_argnames=('settings', 'sizes'))
def resampled(scale, settings=PLAIN, sizes=(512, 512)):
  """DRAWS tokens, each from a pool of its own, in parts that fit in memory."""

  def part(key):
    draw = lambda key: guidance.resample(key, MIXTURES, scale, settings, sizes)[0, 0]  # noqa: E731
    return jax.vmap(draw)(jax.random.split(key, 2000))

  keys = jax.random.split(jax.random.key(3), DRAWS // 2000)
  return jax.lax.map(part, keys).reshape(-1)


@pytest.mark.parametrize('scale', [0.0, 0.5, 1.5, 3.0])
def test_large_pools_give_the_guided_density(scale):
  draws = np.asarray(resampled(scale))
  distance = total_variation(draws, bin_probabilities(lambda x: guided_log_density(x, scale)))
  assert distance < 0.02
  if scale:  # and not that of no guidance
    unguided = bin_probabilities(lambda x: log_density(CONDITIONAL, x))
    assert total_variation(draws, unguided) > 0.05


def test_ten_candidates_come_close():
  """The published 5 + 5; distances for several scales stand in docs/benchmarks.md."""
  settings = {}
  for sizes in ((1, 1), (5, 5), (50, 50)):
    draws = np.asarray(resampled(1.5, sizes=sizes))
    settings[sizes] = total_variation(
      draws, bin_probabilities(lambda x: guided_log_density(x, 1.5))
    )
  assert settings[50, 50] < settings[5, 5] < settings[1, 1]
  assert settings[5, 5] < 0.1


def test_sharpened_weights_and_choice():
  """Weighing with other mixtures than those that propose leads to the density of the two."""
  settings = dataclasses.replace(
    PLAIN, proposal_scales=1.3, weighing_logits=0.5, weighing_scales=0.9, sharpening=1.2
  )
  scale, sizes = 0.8, (512, 0)  # one pool: proposal times weight has a closed form
  draws = np.asarray(resampled(scale, settings, sizes))

  def expected(x):
    weighing = [log_density(p, x, 0.5, 0.9) for p in (CONDITIONAL, UNCONDITIONAL)]
    proposal = log_density(CONDITIONAL, x, scales=1.3)
    return proposal + 1.2 * scale * (weighing[0] - weighing[1])

  assert total_variation(draws, bin_probabilities(expected)) < 0.02


@pytest.mark.parametrize('scale', [0.0, 1.5])
def test_components_product_has_its_closed_form(scale):
  """Of each component: Gaussian where the precision is positive, p_c's Gaussian elsewhere."""
  parts = ([0.6, 0.3, 0.1], [-1.0, 1.2, 3.0], [0.5, 0.7, 1.4])  # the last: wide, improper product
  mixtures = jax.tree.map(
    lambda c, u: jnp.stack([c, u]), *map(make_mixture, (parts, UNCONDITIONAL))
  )
  keys = jax.random.split(jax.random.key(0), DRAWS)
  draw = jax.jit(jax.vmap(lambda key: guidance.component(key, mixtures, scale)[0]))
  weights, means_c, scales_c = map(np.asarray, parts)
  _, means_u, scales_u = map(np.asarray, UNCONDITIONAL)
  precision = (1 + scale) / scales_c**2 - scale / scales_u**2
  mean = ((1 + scale) * means_c / scales_c**2 - scale * means_u / scales_u**2) / precision
  if scale:
    assert (precision > 0).tolist() == [True, True, False]
  mean = np.where(precision > 0, mean, means_c)
  sigma = np.where(precision > 0, 1 / np.sqrt(abs(precision)), scales_c)
  expected = bin_probabilities(lambda x: log_density((weights, mean, sigma), x))
  assert total_variation(draw(keys), expected) < 0.02


def test_without_guidance_tokens_follow_the_mixture():
  keys = jax.random.split(jax.random.key(1), DRAWS)
  settings = dataclasses.replace(PLAIN, proposal_logits=0.5, proposal_scales=0.8)
  alone = jax.tree.map(lambda a: a[:1], MIXTURES)
  draw = jax.jit(jax.vmap(lambda key: guidance.draw_token(key, alone, 2.0, settings)[0]))
  expected = bin_probabilities(lambda x: log_density(CONDITIONAL, x, 0.5, 0.8))
  assert total_variation(draw(keys), expected) < 0.01


@pytest.mark.parametrize('method', ['resample', 'component'])
def test_shared_draws_follow_the_guided_density(method):
  """All tokens of an image pick from one pool, but pick independently."""
  settings = dataclasses.replace(PLAIN, method=method, redundant_candidates=256)
  images, tokens, scale = 2000, 20, 1.0
  keys = jax.random.split(jax.random.key(2), images)
  draw = jax.jit(
    jax.vmap(lambda k: guidance.draw_shared(k, MIXTURES, scale, settings, tokens)[:, 0])
  )
  draws = np.asarray(draw(keys))
  assert draws.shape == (images, tokens)
  if method == 'resample':
    assert total_variation(draws, bin_probabilities(lambda x: guided_log_density(x, scale))) < 0.03
  off_diagonal = np.corrcoef(draws.T)[~np.eye(tokens, dtype=bool)]
  assert abs(off_diagonal.mean()) < 0.02
  assert len(np.unique(draws[0])) > tokens // 2


@pytest.mark.parametrize('method', ['resample', 'component', 'none'])
def test_variance_of_shared_draws(method):
  """The factor scales the deviations from the drawn components' means; at 0 none is left."""
  settings = dataclasses.replace(PLAIN, method=method)
  one = jax.tree.map(lambda a: a[:, :1], MIXTURES)  # one component: draws are Gaussian
  one = one if method != 'none' else jax.tree.map(lambda a: a[:1], one)
  key = jax.random.key(0)
  draw = jax.jit(lambda v: guidance.draw_shared(key, one, 0.0, settings, 4000, v)[:, 0])
  assert np.ptp(draw(0.0)) == 0 or method == 'resample'  # that has two components to pick from
  assert len(np.unique(draw(0.0))) <= 2
  if method != 'resample':
    np.testing.assert_allclose(np.std(draw(4.0)) / np.std(draw(1.0)), 2.0, rtol=1e-4)


def test_draws_are_finite_where_densities_vanish():
  """Narrow components far apart, large scales: no candidate is likely under both."""
  narrow = mixture.Mixture(
    jnp.zeros((2, 2)), jnp.asarray([[[0.0], [1.0]], [[50.0], [90.0]]]), jnp.full((2, 2, 1), -6.9)
  )
  for method in ('resample', 'component'):
    settings = dataclasses.replace(PLAIN, method=method)
    keys = jax.random.split(jax.random.key(0), 100)
    draw = jax.jit(jax.vmap(lambda k, s=settings: guidance.draw_token(k, narrow, 10.0, s)))
    draws = np.asarray(draw(keys))
    assert np.isfinite(draws).all()
    if method == 'resample':  # p' lives where p_c does
      assert (draws < 2).all()
