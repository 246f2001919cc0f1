"""Gaussian mixtures: SciPy, float32 errors, gradients, and distributions of samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from farmer_jax.ops import mixture
from tests.support import jaxprs, models


def rounded(*arrays):
  """Returns a mixture in float64 whose values are exact in float32."""
  return mixture.Mixture(*(a.astype(np.float32).astype(np.float64) for a in arrays))


def random_mixture(lead, components, channels, seed=0, offset=0.0, spread=1.0, scale=0.5):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(*lead, components))
  means = offset + spread * rng.normal(size=(*lead, components, channels))
  return rounded(logits, means, np.log(scale) + 0.3 * rng.normal(size=means.shape))


def points_of(arrays, count, seed=1):
  """`count` samples of each mixture, exact in float32; [..., count, d]."""
  rng, shape = np.random.default_rng(seed), arrays.means.shape
  which = rng.integers(shape[-2], size=(*shape[:-2], count, 1))
  means, log_scales = (
    np.take_along_axis(a, which, axis=-2) for a in (arrays.means, arrays.log_scales)
  )
  points = means + np.exp(log_scales) * rng.normal(size=means.shape)
  return points.astype(np.float32).astype(np.float64)


def to_jax(arrays, dtype):
  return jax.tree.map(lambda a: jnp.asarray(a, dtype), arrays)


def for_each_point(arrays):
  """Returns mixtures [B, 1, ...], which broadcast to points [B, N, d]."""
  return jax.tree.map(lambda a: a[:, None], arrays)


log_prob = jax.jit(mixture.log_prob)
shared_log_prob = jax.jit(mixture.shared_log_prob)


def example(form, components=4, channels=3):
  """Returns a density, a mixture and points."""
  if form == 'shared':
    arrays = random_mixture((2,), components, channels, offset=2.0)
    return mixture.shared_log_prob, arrays, points_of(arrays, 5)
  arrays = random_mixture((2, 3), components, channels)
  return mixture.log_prob, arrays, points_of(arrays, 1)[..., 0, :]


@pytest.mark.parametrize(
  'form, components, channels', [('single', 1, 1), ('single', 4, 3), ('shared', 4, 3)]
)
def test_log_prob_equals_scipy(form, components, channels):
  function, arrays, z = example(form, components, channels)
  with jax.enable_x64(True):
    actual = jax.jit(function)(to_jax(arrays, 'float64'), jnp.asarray(z))
  arrays = for_each_point(arrays) if form == 'shared' else arrays
  np.testing.assert_allclose(actual, models.mixture_log_prob(arrays, z), rtol=1e-12)


def narrow_backgrounds(levels, channels, components=64, seed=0):
  """A mixture whose channels are wide, or have a scale of 0.002 at one of `levels`.

  Images with black or white backgrounds lead to such redundant channels.
  """
  rng = np.random.default_rng(seed)
  shape = (2, components, channels)
  which = rng.integers(len(levels) + 1, size=shape)
  flat = np.append(levels, 0.0)[which] + 1e-3 * rng.normal(size=shape)
  wide = which == len(levels)
  means = np.where(wide, rng.uniform(-1, 1, shape), flat)
  return rounded(rng.normal(size=shape[:2]), means, np.log(np.where(wide, 0.3, 2e-3)))


def close_in_distant_groups(channels, components=64, seed=0):
  """The worst case of the shared form: four distant groups of close components with tiny scales."""
  rng = np.random.default_rng(seed)
  places = 2.0 * rng.integers(2, size=(2, 4, channels)) - 1
  means = places[:, rng.integers(4, size=components)]
  means = means + 1e-3 * rng.normal(size=means.shape)
  return rounded(np.zeros(means.shape[:2]), means, np.full(means.shape, np.log(1e-3)))


def distant(offset, spread, scale):
  return random_mixture((2,), 20, 64, offset=offset, spread=spread, scale=scale)


ROUNDING = 20 * 2.0**-23
FLOAT32_CASES = {
  'standard': (distant(0, 1, 1), ROUNDING),
  'far from zero': (distant(1000, 1, 1), ROUNDING),  # needs the centering
  # 0.001 is the smallest scale of the heads.
  **{f'scale {s}, far': (distant(100, s, s), ROUNDING) for s in (0.1, 0.01, 0.001)},
  # Components far apart relative to their scale: expanded squares cancel.
  **{f'spread of {n} scales': (distant(0, 1, 1 / n), ROUNDING) for n in (10, 100, 1000)},
  **{
    f'{name}, {channels} channels': (narrow_backgrounds(levels, channels), 5e-6)
    for name, levels in (('black', [-1]), ('black or white', [-1, 1]))
    for channels in (8, 64)
  },
  'groups, 64 channels': (close_in_distant_groups(64), 5e-6),
  'groups, 8 channels': (close_in_distant_groups(8), 0.3),
}


@pytest.mark.parametrize('arrays, bound', FLOAT32_CASES.values(), ids=FLOAT32_CASES)
def test_float32_error(arrays, bound):
  """The error in nats per channel relative to float64, at samples of the mixture.

  Measured on a CPU: at most 2e-6 for both forms. Without recomputing the most likely component, the
  error of the shared form is 3e-5, 3e-3 and 0.2 for a spread of 10, 100 and 1000 scales, and up to
  0.15 for black or white backgrounds. For groups in 8 channels it is 0.08: several components
  matter for a token, and only one of them is exact.
  """
  z = points_of(arrays, 64)
  expected = models.mixture_log_prob(for_each_point(arrays), z)
  single = jax.tree.map(lambda a: a.repeat(64, axis=1), for_each_point(to_jax(arrays, 'float32')))
  direct = np.asarray(log_prob(single, jnp.asarray(z, 'float32')))
  shared = np.asarray(shared_log_prob(to_jax(arrays, 'float32'), jnp.asarray(z, 'float32')))
  assert direct.dtype == shared.dtype == np.float32
  assert abs(direct - expected).max() / z.shape[-1] < min(bound, 5e-6)
  assert abs(shared - expected).max() / z.shape[-1] < bound


@pytest.mark.parametrize('spread, scale', [(1, 0.1), (1, 1e-3)])
def test_float32_gradients_of_the_shared_form(spread, scale):
  """Relative error, compared with the direct form in float64.

  Measured on a CPU: 1e-7. Without recomputing the most likely component, the error in the gradients
  of log-scales is 2e-5 at spread / scale = 10 and 0.1 at 1000.
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


def test_shared_form_has_no_array_of_all_differences():
  """Neither the forward nor the backward pass has an array [B, N, K, d]."""
  b, n, k, d = 2, 5, 7, 11
  arrays = mixture.Mixture(*(jnp.zeros(shape) for shape in ((b, k), (b, k, d), (b, k, d))))
  gradient = jax.grad(lambda m, z: mixture.shared_log_prob(m, z).sum(), (0, 1))
  program = jax.make_jaxpr(gradient)(arrays, jnp.zeros((b, n, d)))
  outputs = (v for e in jaxprs.equations(program.jaxpr) for v in e.outvars)
  assert max(v.aval.size for v in outputs) < b * n * k * d


@pytest.mark.parametrize('form', ['single', 'shared'])
def test_gradients_equal_finite_differences(form):
  function, arrays, z = example(form)
  with jax.enable_x64(True):
    primal = (to_jax(arrays, 'float64'), jnp.asarray(z))
    weights = jnp.arange(1.0, 1 + z[..., 0].size)  # distinguishes the points

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
def test_extreme_parameters_stay_finite(logits, log_scale, distance):
  """Values and gradients in float32, also with a component of negligible weight."""
  means = jnp.array([0.0, 1.0, -1.0])[None, :, None].repeat(4, axis=2)
  logits = jnp.array([[logits, -logits, 0.0]])
  parameters = mixture.Mixture(logits, means, jnp.full((1, 3, 4), log_scale))
  z = jnp.full((1, 4), distance)
  for function, point in ((mixture.log_prob, z), (mixture.shared_log_prob, z[:, None])):
    total = jax.value_and_grad(lambda m, z, f=function: f(m, z).sum(), (0, 1))
    for leaf in jax.tree.leaves(jax.jit(total)(parameters, point)):
      assert np.isfinite(leaf).all()


def test_samples_follow_the_mixture():
  """Kolmogorov-Smirnov test of each channel of each mixture, and covariances between channels."""
  count, arrays = 4000, random_mixture((2, 3), 4, 2, spread=2.0)
  draw = jax.jit(mixture.sample, static_argnums=2)
  draws = np.asarray(draw(jax.random.key(0), to_jax(arrays, 'float32'), (2, count // 2)))
  assert draws.shape == (2, 3, 2, count // 2, 2)
  for lead in np.ndindex(2, 3):
    one, z = jax.tree.map(lambda a, i=lead: a[i], arrays), draws[lead].reshape(count, 2)
    for channel in range(2):
      cdf = functools.partial(models.mixture_cdf, one, channel=channel)
      assert stats.kstest(z[:, channel], cdf).pvalue > 1e-3
    # All channels of a sample come from one component, which correlates them.
    weights, means, variances = special.softmax(one.logits), one.means, np.exp(2 * one.log_scales)
    mean = weights @ means
    covariance = (means.T * weights) @ means - np.outer(mean, mean) + np.diag(weights @ variances)
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.06 * np.trace(covariance))
  flat = draws[..., 0].reshape(12, count // 2)
  correlations = np.corrcoef(flat) - np.eye(12)
  assert abs(correlations).max() < 5 / (count // 2) ** 0.5  # draws are independent of each other


def test_sample_without_a_shape_draws_one_point():
  arrays = random_mixture((2, 3), 4, 2, scale=1e-3)
  z = np.asarray(jax.jit(mixture.sample)(jax.random.key(0), to_jax(arrays, 'float32')))
  assert z.shape == (2, 3, 2)
  distance = abs(z[..., None, :] - arrays.means).max(-1).min(-1)  # to the nearest component
  assert distance.max() < 0.01


def test_standard_normal_log_prob():
  z = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  actual = mixture.standard_normal_log_prob(jnp.asarray(z))
  np.testing.assert_allclose(actual, stats.norm.logpdf(z).sum(-1), rtol=1e-6)
  assert (np.asarray(mixture.standard_normal_log_prob(jnp.zeros((3, 4, 0)))) == 0).all()
