"""Guided draws compared with the guided density, integrated numerically in one dimension."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from farmer_jax import config
from farmer_jax.ops import guidance, mixture

DRAWS, RESAMPLED = 100_000, 50_000
# p_c and p_u: weights, means, standard deviations.
CONDITIONAL = ([0.6, 0.3, 0.1], [-1.0, 1.2, 3.0], [0.5, 0.7, 0.4])
UNCONDITIONAL = ([0.3, 0.4, 0.3], [-1.2, 0.8, 2.5], [0.9, 1.2, 1.0])
EDGES = np.linspace(-5, 6, 56)
PLAIN = config.Guidance()


@pytest.fixture(autouse=True, scope='module')
def _fast(optimized):
  """The draws take longer than full compilation."""
  with optimized():
    yield


def make_mixtures(*densities):
  """p_c, or p_c and p_u, as a `Mixture` [S, K, 1]."""
  weights, means, scales = (jnp.asarray(part, jnp.float32) for part in zip(*densities, strict=True))
  return mixture.Mixture(jnp.log(weights) + 0.7, means[..., None], jnp.log(scales)[..., None])


MIXTURES = make_mixtures(CONDITIONAL, UNCONDITIONAL)


def log_density(density, x, logit_factor=1.0, scale_factor=1.0):
  weights, means, sigmas = (np.asarray(part) for part in density)
  log_weights = special.log_softmax(logit_factor * np.log(weights))
  components = stats.norm.logpdf(x[..., None], means, scale_factor * sigmas)
  return special.logsumexp(log_weights + components, axis=-1)


def guided_log_density(x, scale):
  log_c, log_u = (log_density(density, x) for density in (CONDITIONAL, UNCONDITIONAL))
  return log_c + scale * (log_c - log_u)


def total_variation(draws, log_unnormalized):
  """Distance of draws to a density, over the bins between EDGES and the two tails."""
  edges = np.concatenate([[-12.0], EDGES, [14.0]])
  x = np.linspace(edges[:-1], edges[1:], 401, axis=1)
  masses = integrate.simpson(np.exp(log_unnormalized(x)), x=x)
  counts = np.histogram(draws, np.concatenate([[-np.inf], EDGES, [np.inf]]))[0]
  return 0.5 * abs(counts / counts.sum() - masses / masses.sum()).sum()


@functools.partial(jax.jit, static_argnames=('settings', 'sizes'))
def resampled(scale, settings=PLAIN, sizes=(256, 256)):
  """RESAMPLED tokens, each from its own candidates, in parts that fit in memory."""

  def draw(key):
    return guidance.resample(key, MIXTURES, scale, settings, sizes)[0][0, 0]

  keys = jax.random.split(jax.random.key(3), (RESAMPLED // 2000, 2000))
  return jax.lax.map(jax.vmap(draw), keys).reshape(-1)


@pytest.mark.parametrize(
  'scale', [1.5, *(pytest.param(scale, marks=pytest.mark.slow) for scale in (0.0, 0.5, 3.0))]
)
def test_many_candidates_give_the_guided_density(scale):
  draws = np.asarray(resampled(scale))
  assert total_variation(draws, lambda x: guided_log_density(x, scale)) < 0.02
  if scale:
    assert total_variation(draws, lambda x: log_density(CONDITIONAL, x)) > 0.05


@pytest.mark.slow
def test_more_candidates_come_closer():
  """The paper's 5 + 5 candidates; docs/benchmarks.md has distances for several scales."""
  distances = [
    total_variation(np.asarray(resampled(1.5, sizes=sizes)), lambda x: guided_log_density(x, 1.5))
    for sizes in ((50, 50), (5, 5), (1, 1))
  ]
  assert distances == sorted(distances) and distances[1] < 0.1


def test_sharpening():
  """With candidates from p_c alone, proposal density times weight has a closed form."""
  factors = dict(weighing_logit_factor=0.5, weighing_scale_factor=0.9)
  settings = config.Guidance(proposal_scale_factor=1.3, sharpening=1.2, **factors)
  scale = 0.8
  draws = np.asarray(resampled(scale, settings, (256, 0)))

  def expected(x):
    log_c, log_u = (log_density(d, x, 0.5, 0.9) for d in (CONDITIONAL, UNCONDITIONAL))
    return log_density(CONDITIONAL, x, scale_factor=1.3) + 1.2 * scale * (log_c - log_u)

  assert total_variation(draws, expected) < 0.02


@pytest.mark.parametrize('scale', [0.0, 1.5])
def test_component_product_has_its_closed_form(scale):
  """Gaussian where the precision of the product is positive, elsewhere the Gaussian of p_c."""
  weights, means_c, scales_c = map(np.asarray, CONDITIONAL)
  scales_c = np.asarray([0.5, 0.7, 1.4])  # the last product has a negative precision
  mixtures = make_mixtures((weights, means_c, scales_c), UNCONDITIONAL)
  keys = jax.random.split(jax.random.key(0), DRAWS)
  draw = jax.vmap(lambda key: guidance.draw_component_product(key, mixtures, scale)[0])
  _, means_u, scales_u = map(np.asarray, UNCONDITIONAL)
  precision = (1 + scale) / scales_c**2 - scale / scales_u**2
  mean = ((1 + scale) * means_c / scales_c**2 - scale * means_u / scales_u**2) / precision
  if scale:
    assert (precision > 0).tolist() == [True, True, False]
  mean = np.where(precision > 0, mean, means_c)
  sigma = np.where(precision > 0, 1 / np.sqrt(abs(precision)), scales_c)
  expected = functools.partial(log_density, (weights, mean, sigma))
  assert total_variation(jax.jit(draw)(keys), expected) < 0.02


def test_draws_without_guidance_follow_the_mixture():
  settings = config.Guidance(proposal_logit_factor=0.5, proposal_scale_factor=0.8)
  conditional = make_mixtures(CONDITIONAL)
  keys = jax.random.split(jax.random.key(1), 2 * DRAWS)
  draw = jax.vmap(lambda key: guidance.draw_token(key, conditional, 2.0, settings)[0][0])
  expected = functools.partial(log_density, CONDITIONAL, logit_factor=0.5, scale_factor=0.8)
  assert total_variation(jax.jit(draw)(keys), expected) < 0.01


@pytest.mark.parametrize('method', ['resample', 'component'])
def test_shared_draws_follow_the_guided_density(method):
  """All tokens of an image choose from one pool, but independently."""
  settings = config.Guidance(method=method, redundant_candidates=256)
  images, tokens, scale = 1000, 20, 1.0
  keys = jax.random.split(jax.random.key(2), images)
  draw = jax.vmap(lambda k: guidance.draw_shared(k, MIXTURES, scale, settings, tokens)[0][:, 0])
  draws = np.asarray(jax.jit(draw)(keys))
  assert draws.shape == (images, tokens)
  if method == 'resample':
    assert total_variation(draws, lambda x: guided_log_density(x, scale)) < 0.03
  off_diagonal = np.corrcoef(draws.T)[~np.eye(tokens, dtype=bool)]
  assert abs(off_diagonal.mean()) < 0.02
  assert len(np.unique(draws[0])) > tokens // 2


@pytest.mark.parametrize('method', ['resample', 'component', 'none'])
def test_variance_of_shared_draws(method):
  """The factor scales deviations from the means of components; with 0 there are none."""
  settings = config.Guidance(method=method)
  # One component, so that draws are Gaussian.
  one = jax.tree.map(lambda a: a[: 1 if method == 'none' else 2, :1], MIXTURES)
  key = jax.random.key(0)
  draw = jax.jit(lambda v: guidance.draw_shared(key, one, 0.0, settings, 4000, v)[0][:, 0])
  if method == 'resample':  # chooses between the components of p_c and p_u
    assert len(np.unique(draw(0.0))) <= 2
  else:
    assert np.ptp(draw(0.0)) == 0
    np.testing.assert_allclose(np.std(draw(4.0)) / np.std(draw(1.0)), 2.0, rtol=1e-4)


@pytest.mark.parametrize('method', ['resample', 'component'])
def test_draws_are_finite_where_densities_vanish(method):
  """Narrow components far apart and a large scale: no candidate is likely under both mixtures."""
  narrow = mixture.Mixture(
    jnp.zeros((2, 2)), jnp.asarray([[[0.0], [1.0]], [[50.0], [90.0]]]), jnp.full((2, 2, 1), -6.9)
  )
  settings = config.Guidance(method=method)
  keys = jax.random.split(jax.random.key(0), 20)
  draw = jax.vmap(lambda key: guidance.draw_token(key, narrow, 10.0, settings)[0])
  draws = np.asarray(jax.jit(draw)(keys))
  assert np.isfinite(draws).all()
  if method == 'resample':  # p' is concentrated where p_c is
    assert (draws < 2).all()


FACTORS = dict(weighing_logit_factor=0.5, weighing_scale_factor=0.9)


@pytest.mark.parametrize('scale', [0.0, 1.5, 5.0])
def test_effective_size_of_a_pool(scale):
  """The same candidates, with weights in float64 from densities of SciPy."""
  settings = config.Guidance(proposal_scale_factor=1.3, sharpening=1.2, **FACTORS)
  sizes = 7, 4
  keys = jax.random.split(jax.random.key(4), 50)

  def candidates(key):
    proposal = mixture.sharpen(MIXTURES, 1.0, 1.3)
    pools = mixture.sample(jax.random.split(key)[0], proposal, (max(sizes),))
    return jnp.concatenate([pools[0, : sizes[0]], pools[1, : sizes[1]]])[:, 0]

  x = np.asarray(jax.vmap(candidates)(keys), np.float64)
  log_c, log_u = (log_density(d, x, 0.5, 0.9) for d in (CONDITIONAL, UNCONDITIONAL))
  powers = np.repeat([scale, scale + 1], sizes)
  weights = np.exp(1.2 * powers * (log_c - log_u))
  expected = weights.sum(1) ** 2 / (weights**2).sum(1) / 11

  draw = jax.vmap(lambda key: guidance.resample(key, MIXTURES, scale, settings, sizes, 3))
  draws, found = jax.jit(draw)(keys)
  assert draws.shape == (50, 3, 1) and found.shape == (50,)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  assert 1 / 11 < found.min() < 0.8 and found.max() < 1


def test_effective_size_is_the_pool_size_for_equal_weights():
  """Without guidance and candidates from p_u, or if p_c = p_u; but not if one weight dominates."""
  key = jax.random.key(0)
  same = make_mixtures(CONDITIONAL, CONDITIONAL)
  far = make_mixtures(([1.0], [0.0], [1e-3]), ([1.0], [5.0], [1e-3]))
  for mixtures, scale, sizes, expected in (
    (MIXTURES, 0.0, (9, 0), 1),
    (same, 4.0, (5, 3), 1),
    (far, 0.0, (1, 8), 1 / 9),
  ):
    _, found = guidance.resample(key, mixtures, scale, PLAIN, sizes)
    assert found == pytest.approx(expected, rel=1e-6)


def test_draws_of_a_batch_have_the_effective_sizes_of_their_pools():
  """`scales` has the guidance scale of each token. The redundant channels use the last."""
  settings = config.Guidance(conditional_candidates=3, redundant_candidates=6)
  keys = jax.random.split(jax.random.key(5), 2)
  draws = guidance.GuidedDraws(keys, jnp.asarray([0.5, 2.0]), 1.0, settings)
  mixtures = jax.tree.map(lambda a: jnp.repeat(a[:, None], 2, axis=1), MIXTURES)
  informative, redundant = jax.vmap(jax.random.split)(keys).swapaxes(0, 1)
  for i, scale in enumerate((0.5, 2.0)):
    token, fractions = draws.token(mixtures, jnp.int32(i))
    for b in range(2):
      key = jax.random.fold_in(informative[b], i)
      expected = guidance.resample(key, MIXTURES, scale, settings, (3, 5))
      np.testing.assert_allclose(fractions[b], expected[1], rtol=1e-5)
      np.testing.assert_allclose(token[b], expected[0][0], rtol=1e-5)
  _, fractions = draws.shared(mixtures, 2)
  for b in range(2):
    _, expected = guidance.resample(redundant[b], MIXTURES, 2.0, settings, (6, 6), 2)
    np.testing.assert_allclose(fractions[b], expected, rtol=1e-5)
  for other in (config.Guidance(method='component'), PLAIN):
    num_streams = 2 if other.method == 'component' else 1
    streams = jax.tree.map(lambda a, s=num_streams: a[:s], mixtures)
    plain = guidance.GuidedDraws(keys, jnp.ones(2), 1.0, other)
    assert plain.token(streams, jnp.int32(0))[1] is None and plain.shared(streams, 2)[1] is None
