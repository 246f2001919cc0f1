"""The Fréchet distance against its definition (SciPy) and closed forms; moments added in parts."""

import numpy as np
import pytest
import scipy.linalg

from farmer_jax.ops import frechet


@pytest.fixture
def features():
  """Two sets whose features are correlated and far from zero."""
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(2, 6, 6))
  return [rng.normal(size=(n, 6)) @ m + 1e4 + s for n, m, s in ((500, mix[0], 0), (90, mix[1], 1))]


def test_moments_of_parts_add_up(features):
  whole = np.concatenate(features)
  parts = [frechet.Moments.of(part) for part in np.split(whole, [1, 40, 470])]
  total = sum(parts[1:], parts[0])
  assert total.count == len(whole)
  np.testing.assert_allclose(total.mean, whole.mean(0), rtol=1e-14)
  np.testing.assert_allclose(total.covariance, np.cov(whole, rowvar=False), rtol=1e-10)


def test_float32_features_are_summed_in_float64():
  values = (1e4 + np.random.default_rng(0).normal(size=(10_000, 2))).astype(np.float32)
  found = frechet.Moments.of(values)
  np.testing.assert_allclose(found.covariance, np.cov(values.astype(float).T), rtol=1e-10)


def test_distance_is_its_definition(features):
  a, b = (frechet.Moments.of(f) for f in features)
  root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
  expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
  found = frechet.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_distance_of_commuting_covariances():
  """With diagonal covariances: squared differences of means and of standard deviations. A standard
  deviation of zero is nothing special."""
  means, stds = np.array([[0, 1, 2], [3, 1, 0]]), np.array([[1, 2, 0], [3, 0, 0]])
  expected = ((means[0] - means[1]) ** 2).sum() + ((stds[0] - stds[1]) ** 2).sum()
  a, b = ((m, np.diag(s**2)) for m, s in zip(means, stds, strict=True))
  np.testing.assert_allclose(frechet.frechet_distance(*a, *b), expected, rtol=1e-12)


def test_a_set_is_at_no_distance_from_itself(features):
  a = frechet.Moments.of(features[0])
  assert abs(frechet.frechet_distance(a.mean, a.covariance, a.mean, a.covariance)) < 1e-7
