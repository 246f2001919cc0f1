"""Fréchet distance, KID, Inception Score, precision and recall against their definitions.

tests/evaluation/test_inception.py compares them with torch-fidelity.
"""

import itertools

import numpy as np
import pytest
import scipy.linalg

from farmer_jax.ops import sample_quality


@pytest.fixture
def features():
  """Two sets of correlated features, far from zero."""
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(2, 6, 6))
  return [rng.normal(size=(n, 6)) @ m + 1e4 + s for n, m, s in ((500, mix[0], 0), (90, mix[1], 1))]


def test_sum_of_moments_is_moments_of_union(features):
  union = np.concatenate(features)
  parts = [sample_quality.Moments.of(part) for part in np.split(union, [1, 40, 470])]
  total = sum(parts[1:], parts[0])
  assert total.count == len(union)
  np.testing.assert_allclose(total.mean, union.mean(0), rtol=1e-14)
  np.testing.assert_allclose(total.covariance, np.cov(union, rowvar=False), rtol=1e-10)


def test_float32_features_are_summed_in_float64():
  values = (1e4 + np.random.default_rng(0).normal(size=(10_000, 2))).astype(np.float32)
  moments = sample_quality.Moments.of(values)
  np.testing.assert_allclose(moments.covariance, np.cov(values.astype(float).T), rtol=1e-10)


def test_frechet_distance_equals_definition(features):
  a, b = map(sample_quality.Moments.of, features)
  root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
  expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
  np.testing.assert_allclose(sample_quality.frechet_distance(a, b), expected, rtol=1e-9)
  assert abs(sample_quality.frechet_distance(a, a)) < 1e-7


def test_frechet_distance_of_diagonal_and_singular_covariances():
  """The sum of squared differences of means and of standard deviations."""
  means, stds = np.array([[0, 1, 2], [3, 1, 0]]), np.array([[1, 2, 0], [3, 0, 0]])
  expected = ((means[0] - means[1]) ** 2).sum() + ((stds[0] - stds[1]) ** 2).sum()
  a, b = (sample_quality.Moments(2, m, np.diag(s**2.0)) for m, s in zip(means, stds, strict=True))
  np.testing.assert_allclose(sample_quality.frechet_distance(a, b), expected, rtol=1e-12)


def test_kernel_distance_equals_definition():
  """All images in every subset give the definition, and random subsets an unbiased estimate."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(9, 4)), rng.normal(0.3, 1.2, size=(9, 4))

  def kernel(x, y):
    return (sum(x * y) / 4 + 1) ** 3

  within = sum(kernel(*pair) for x in (a, b) for pair in itertools.permutations(x, 2)) / (9 * 8)
  expected = within - 2 * np.mean([kernel(x, y) for x in a for y in b])
  distance = sample_quality.kernel_distance(a, b, subsets=3, subset_size=9)
  np.testing.assert_allclose(distance, (expected, 0), atol=1e-12)
  mean, std = sample_quality.kernel_distance(a, b, subsets=3000, subset_size=5)
  assert abs(mean - expected) < 4 * std / 3000**0.5


@pytest.mark.parametrize('classes', [2, 7])
def test_inception_score_of_certain_and_uniform_predictions(classes):
  certain = 2000.0 * np.eye(classes)[np.arange(10 * classes) % classes]  # exp(-2000) is 0
  score = sample_quality.inception_score(certain, 10, seed=None)
  np.testing.assert_allclose(score, (classes, 0), atol=1e-12)
  score = sample_quality.inception_score(np.full((30, classes), 123.0))
  np.testing.assert_allclose(score, (1, 0), atol=1e-12)


def test_inception_score_equals_definition():
  logits = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(1, keepdims=True)
  halves = [p[:5], p[5:]]
  scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in halves]
  score = sample_quality.inception_score(logits, 2, seed=None)
  np.testing.assert_allclose(score, (np.mean(scores), np.std(scores)), rtol=1e-6)
  assert sample_quality.inception_score(logits, 2) != score  # permuted before the split
  # A constant added to all logits of an image has no effect.
  shifted = sample_quality.inception_score(logits.astype(float) + 9, 2, None)
  np.testing.assert_allclose(shifted, score, rtol=1e-6)


def direct_precision_recall(real, generated, neighbors):
  def distances(x, y):
    return ((x[:, None] - y) ** 2).sum(-1)

  def fraction(x, points):
    radii = np.sort(distances(points, points))[:, neighbors]
    return (distances(x, points) <= radii).any(1).mean()

  real, generated = (np.asarray(s, np.float64) for s in (real, generated))
  return fraction(generated, real), fraction(real, generated)


@pytest.mark.parametrize('neighbors,chunk_size', [(1, 1000), (3, 64), (5, 70)])
@pytest.mark.parametrize('far', [False, True])
def test_precision_and_recall_equal_definition(neighbors, chunk_size, far):
  """Also far from zero: narrow clusters, whose inner distances float32 products would lose."""
  rng = np.random.default_rng(0)
  real, generated = rng.normal(size=(210, 6)), rng.normal(0.5, 0.8, size=(150, 6))
  if far:
    center = 1e4 * np.arange(1, 3).repeat(105)[:, None]
    real, generated = ((x + center[-len(x) :]).astype(np.float32) for x in (real, generated))
  expected = direct_precision_recall(real, generated, neighbors)
  assert 0.2 < expected[1] < expected[0] < 1
  result = sample_quality.precision_recall(real, generated, neighbors, chunk_size)
  np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_surface_belongs_to_the_ball():
  """One neighbor: the balls around 0, 1, 3 have radii 1, 1, 2; those around 5, 9 have radius 4."""
  real, generated = (np.array(x, np.float32)[:, None] for x in ([0, 1, 3], [5, 9]))
  # 5 is on the surface of the ball around 3, and 1 is on the surface of the ball around 5.
  assert sample_quality.precision_recall(real, generated, 1) == (0.5, pytest.approx(2 / 3))
  shifted = np.nextafter(generated, np.float32(6))
  assert sample_quality.precision_recall(real, shifted, 1) == (0, pytest.approx(1 / 3))


def test_precision_and_recall_of_more_copies_than_candidates():
  """The balls around copies have radius 0 and contain only the copies."""
  rng = np.random.default_rng(0)
  image = rng.normal(1e3, 1, size=(1, 32)).astype(np.float32)
  copies, others = image.repeat(40, 0), rng.normal(1e3, 1, size=(30, 32)).astype(np.float32)
  assert sample_quality.precision_recall(copies, copies) == (1, 1)
  with_copy = np.concatenate([others, image])
  assert sample_quality.precision_recall(copies, with_copy) == (pytest.approx(1 / 31), 1)
  assert sample_quality.precision_recall(copies, np.nextafter(copies, np.float32(0))) == (0, 0)


def test_too_few_images_are_refused():
  few = np.zeros((3, 2))
  with pytest.raises(ValueError, match='1000 from 3 and 3'):
    sample_quality.kernel_distance(few, few)
  with pytest.raises(ValueError, match='10 splits of 3'):
    sample_quality.inception_score(few)
  with pytest.raises(ValueError, match='sets of 3 and 3'):
    sample_quality.precision_recall(few, few)
