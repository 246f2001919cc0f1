"""Gaussian mixtures against SciPy, finite differences and their own distribution functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from farmer_jax.ops import mixture

FLOAT32_EPS = 2.0**-23


def random_mixture(lead, components, channels, seed=0, offset=0.0, spread=1.0, scale=0.5):
  """Arrays (logits, means, log_scales): float64, but exact in float32."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(*lead, components))
  means = offset + spread * rng.normal(size=(*lead, components, channels))
  log_scales = np.log(scale) + 0.3 * rng.normal(size=means.shape)
  return [a.astype(np.float32).astype(np.float64) for a in (logits, means, log_scales)]


def points_of(arrays, count, seed=1):
  """`count` points a mixture, drawn from it, exact in float32; [..., count, d]."""
  _, means, log_scales = arrays
  rng = np.random.default_rng(seed)
  which = rng.integers(means.shape[-2], size=(*means.shape[:-2], count, 1))
  means, log_scales = (np.take_along_axis(a, which, axis=-2) for a in (means, log_scales))
  points = means + np.exp(log_scales) * rng.normal(size=means.shape)
  return points.astype(np.float32).astype(np.float64)


def to_jax(arrays, dtype):
  return mixture.Mixture(*(jnp.asarray(a, dtype) for a in arrays))


def scipy_log_prob(arrays, z):
  """log Σ_k w_k N(z; ...) in NumPy; each axis of `z` in front of the channels broadcasts."""
  logits, means, log_scales = arrays
  components = stats.norm.logpdf(z[..., None, :], means, np.exp(log_scales)).sum(-1)
  return special.logsumexp(special.log_softmax(logits, axis=-1) + components, axis=-1)


def cdf(arrays, z, channel):
  """Distribution function of one channel of one mixture."""
  logits, means, log_scales = (np.asarray(a, np.float64) for a in arrays)
  parts = stats.norm.cdf(z[:, None], means[:, channel], np.exp(log_scales[:, channel]))
  return parts @ special.softmax(logits)


log_prob = jax.jit(mixture.log_prob)
shared_log_prob = jax.jit(mixture.shared_log_prob)


@pytest.mark.parametrize('components, channels', [(1, 1), (4, 3)])
def test_log_prob_against_scipy(components, channels):
  with jax.enable_x64(True):
    arrays = random_mixture((2, 3), components, channels)
    z = points_of(arrays, 1)[..., 0, :]
    actual = log_prob(to_jax(arrays, 'float64'), jnp.asarray(z))
    assert actual.shape == (2, 3)
  expected = np.empty((2, 3))
  for index in np.ndindex(2, 3):
    logits, means, log_scales = (a[index] for a in arrays)
    densities = [
      stats.multivariate_normal.logpdf(z[index], mean, np.diag(np.exp(2 * log_scale)))
      for mean, log_scale in zip(means, log_scales, strict=True)
    ]
    expected[index] = special.logsumexp(special.log_softmax(logits) + np.asarray(densities))
  np.testing.assert_allclose(actual, expected, rtol=1e-12)
  np.testing.assert_allclose(scipy_log_prob(arrays, z), expected, rtol=1e-12)


def test_shared_log_prob_is_the_direct_form():
  with jax.enable_x64(True):
    arrays = random_mixture((2,), 4, 3, offset=2.0)
    z = points_of(arrays, 5)
    shared = to_jax(arrays, 'float64')
    actual = shared_log_prob(shared, jnp.asarray(z))
    direct = jax.jit(jax.vmap(mixture.log_prob, (None, 1), 1))(shared, jnp.asarray(z))
  np.testing.assert_allclose(actual, direct, rtol=1e-12)
  np.testing.assert_allclose(actual, scipy_log_prob([a[:, None] for a in arrays], z), rtol=1e-12)


@pytest.mark.parametrize(
  'offset, spread, scale',
  [
    (0, 1, 1),
    (1000, 1, 1),  # far from zero: the centring must take this away
    (100, 0.1, 0.1),
    (100, 1e-2, 1e-2),
    (100, 1e-3, 1e-3),  # the smallest scales that the heads allow
    (0, 1, 0.1),  # components far apart for their size: there an expanded square cancels
    (0, 1, 0.01),
    (0, 1, 1e-3),
  ],
)
def test_float32_error(offset, spread, scale):
  """The error in nats a channel against float64, at points that the mixture gives high density.

  Measured (CPU): either form at most 1e-6 everywhere. With all components from the expanded square
  the shared form erred by 3e-5 at spread / scale = 10, 3e-3 at 100 and 0.2 at 1000.
  """
  arrays = random_mixture((2,), 20, 64, offset=offset, spread=spread, scale=scale)
  z = points_of(arrays, 16)
  expected = scipy_log_prob([a[:, None] for a in arrays], z)
  single = to_jax([a[:, None].repeat(16, axis=1) for a in arrays], 'float32')
  direct = np.asarray(log_prob(single, jnp.asarray(z, 'float32')))
  shared = np.asarray(shared_log_prob(to_jax(arrays, 'float32'), jnp.asarray(z, 'float32')))
  assert direct.dtype == shared.dtype == np.float32
  assert abs(direct - expected).max() / 64 < 20 * FLOAT32_EPS
  assert abs(shared - expected).max() / 64 < 20 * FLOAT32_EPS


def narrow_backgrounds(levels, channels, components=64, seed=0):
  """A mixture of which each channel is either at one of `levels`, to within 0.002, or wide: what
  flat backgrounds of black and white make of redundant channels."""
  rng = np.random.default_rng(seed)
  shape = (2, components, channels)
  which = rng.integers(len(levels) + 1, size=shape)
  flat = np.append(levels, 0.0)[which] + 1e-3 * rng.normal(size=shape)
  wide = which == len(levels)
  means = np.where(wide, rng.uniform(-1, 1, shape), flat)
  log_scales = np.log(np.where(wide, 0.3, 2e-3))
  arrays = (rng.normal(size=shape[:2]), means, log_scales)
  return [a.astype(np.float32).astype(np.float64) for a in arrays]


def alike_but_far(channels, components=64, seed=0):
  """Components at the floor of scales, in four groups far apart, alike within a group: the worst
  that the shared form can meet."""
  rng = np.random.default_rng(seed)
  places = 2.0 * rng.integers(2, size=(2, 4, channels)) - 1
  means = places[:, rng.integers(4, size=components)]
  means = means + 1e-3 * rng.normal(size=means.shape)
  arrays = (np.zeros(means.shape[:2]), means, np.full(means.shape, np.log(1e-3)))
  return [a.astype(np.float32).astype(np.float64) for a in arrays]


@pytest.mark.parametrize(
  'arrays, bound',
  [
    (narrow_backgrounds([-1], 8), 5e-6),
    (narrow_backgrounds([-1], 64), 5e-6),
    (narrow_backgrounds([-1, 1], 8), 5e-6),
    (narrow_backgrounds([-1, 1], 64), 5e-6),
    (alike_but_far(64), 5e-6),
    (alike_but_far(8), 0.3),
  ],
  ids=['black-8', 'black-64', 'black or white-8', 'black or white-64', 'alike-64', 'alike-8'],
)
def test_float32_error_of_the_shared_form_where_scales_differ(arrays, bound):
  """Nats a channel against SciPy in float64.

  Measured (CPU): at most 2e-6, where the expanded square alone erred by 0.005 to 0.15; but 0.08 for
  components that overlap in all of few channels, at the floor, and far from the centre: there
  several components matter to a token, and only one of them is exact.
  """
  z = points_of(arrays, 64)
  expected = scipy_log_prob([a[:, None] for a in arrays], z)
  shared = np.asarray(shared_log_prob(to_jax(arrays, 'float32'), jnp.asarray(z, 'float32')))
  assert abs(shared - expected).max() / z.shape[-1] < bound


@pytest.mark.parametrize('spread, scale', [(1, 0.1), (1, 1e-3)])
def test_float32_gradients_of_the_shared_form(spread, scale):
  """Against those of the direct form in float64, relative to the size of each.

  Measured (CPU): 1e-7. Expanded squares alone erred by 2e-5 in the gradients of log-scales at
  spread / scale = 10, and by a tenth at 1000.
  """
  arrays = random_mixture((2,), 20, 64, spread=spread, scale=scale)
  z = points_of(arrays, 16)

  def direct(mixtures, z):
    return jax.vmap(mixture.log_prob, (None, 1), 1)(mixtures, z).mean()

  def shared(mixtures, z):
    return mixture.shared_log_prob(mixtures, z).mean()

  actual = jax.jit(jax.grad(shared, (0, 1)))(to_jax(arrays, 'float32'), jnp.asarray(z, 'float32'))
  with jax.enable_x64(True):
    expected = jax.jit(jax.grad(direct, (0, 1)))(to_jax(arrays, 'float64'), jnp.asarray(z))
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    a, e = (np.asarray(array, np.float64) for array in (a, e))
    assert np.linalg.norm(a - e) < 3e-6 * np.linalg.norm(e)


def test_the_shared_form_never_holds_all_differences():
  """No array [B, N, K, d] is made, forwards or backwards."""
  b, n, k, d = 2, 5, 7, 11
  arrays = mixture.Mixture(*(jnp.zeros(shape) for shape in ((b, k), (b, k, d), (b, k, d))))
  gradient = jax.grad(lambda m, z: mixture.shared_log_prob(m, z).sum(), (0, 1))
  program = jax.jit(gradient).trace(arrays, jnp.zeros((b, n, d))).jaxpr

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (v.aval.size for v in equation.outvars)
      for inner in jax.core.jaxprs_in_params(equation.params):
        yield from sizes(inner)

  assert max(sizes(program.jaxpr)) < b * n * k * d


@pytest.mark.parametrize('form', ['single', 'shared'])
def test_gradients_against_finite_differences(form):
  function = mixture.log_prob if form == 'single' else mixture.shared_log_prob
  with jax.enable_x64(True):
    arrays = random_mixture((2, 3) if form == 'single' else (2,), 4, 3)
    z = points_of(arrays, 1 if form == 'single' else 5)
    z = z[..., 0, :] if form == 'single' else z
    primal = (to_jax(arrays, 'float64'), jnp.asarray(z))
    weights = jnp.arange(1.0, 1 + z[..., 0].size)  # no two points' gradients may be mixed up

    def moved(primal, direction, step):
      args = jax.tree.map(lambda a, b: a + step * b, primal, direction)
      return function(*args).ravel() @ weights

    gradient = jax.jit(jax.grad(lambda primal: moved(primal, primal, 0.0)))(primal)
    moved = jax.jit(moved)
    for seed in range(3):
      rng = np.random.default_rng(seed)
      direction = jax.tree.map(lambda a, rng=rng: rng.normal(size=a.shape), primal)
      numeric = (moved(primal, direction, 1e-5) - moved(primal, direction, -1e-5)) / 2e-5
      along = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), gradient, direction)))
      np.testing.assert_allclose(along, numeric, rtol=1e-7)


@pytest.mark.parametrize(
  'logits, log_scale, distance',
  [(1e4, 0.0, 1.0), (0.0, -12.0, 1.0), (0.0, 30.0, 1.0), (0.0, 0.0, 1e6), (1e4, -7.0, 100.0)],
)
def test_extremes_stay_finite(logits, log_scale, distance):
  """Values and gradients in float32, with a component that has no weight left to speak of."""
  arrays = (
    np.array([[logits, -logits, 0.0]]),
    np.array([0.0, 1.0, -1.0])[None, :, None].repeat(4, axis=2),
    np.full((1, 3, 4), log_scale),
  )
  parameters = to_jax(arrays, 'float32')
  z = jnp.full((1, 4), distance)
  for function, point in ((mixture.log_prob, z), (mixture.shared_log_prob, z[:, None])):
    value, gradient = jax.jit(jax.value_and_grad(lambda m, z, f=function: f(m, z).sum(), (0, 1)))(
      parameters, point
    )
    for leaf in jax.tree.leaves((value, gradient)):
      assert np.isfinite(leaf).all()


def test_samples_follow_the_mixture():
  """Kolmogorov-Smirnov against each channel's own distribution function, for each mixture apart."""
  count, arrays = 4000, random_mixture((2, 3), 4, 2, spread=2.0)
  draw = jax.jit(mixture.sample, static_argnums=2)
  draws = np.asarray(draw(jax.random.key(0), to_jax(arrays, 'float32'), (2, count // 2)))
  assert draws.shape == (2, 3, 2, count // 2, 2)
  for lead in np.ndindex(2, 3):
    one, z = [a[lead] for a in arrays], draws[lead].reshape(count, 2)
    for channel in range(2):
      result = stats.kstest(z[:, channel], lambda x, m=one, c=channel: cdf(m, x, c))
      assert result.pvalue > 1e-3
    # All channels of a draw come from the same component: that is what correlates them.
    weights, means, variances = special.softmax(one[0]), one[1], np.exp(2 * one[2])
    mean = weights @ means
    covariance = (means.T * weights) @ means - np.outer(mean, mean) + np.diag(weights @ variances)
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.06 * np.trace(covariance))
  flat = draws.reshape(6, 2, count // 2, 2)[..., 0]
  correlations = np.corrcoef(flat.reshape(12, count // 2)) - np.eye(12)
  assert abs(correlations).max() < 5 / (count // 2) ** 0.5  # draws are independent of each other


def test_sample_without_a_shape_draws_once_from_each():
  arrays = random_mixture((2, 3), 4, 2, scale=1e-3)
  z = np.asarray(jax.jit(mixture.sample)(jax.random.key(0), to_jax(arrays, 'float32')))
  assert z.shape == (2, 3, 2)
  distance = abs(z[..., None, :] - arrays[1]).max(-1).min(-1)  # to the nearest component
  assert distance.max() < 0.01


def test_standard_normal_log_prob():
  z = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  actual = mixture.standard_normal_log_prob(jnp.asarray(z))
  np.testing.assert_allclose(actual, stats.norm.logpdf(z).sum(-1), rtol=1e-6)
  assert (np.asarray(mixture.standard_normal_log_prob(jnp.zeros((3, 4, 0)))) == 0).all()
