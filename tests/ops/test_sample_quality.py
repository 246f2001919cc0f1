"""KID, Inception Score, precision and recall against their definitions. That they are what
torch-fidelity computes is in tests/evaluation/test_inception.py, with the features."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax.ops import sample_quality


def test_kernel_distance_is_its_definition():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(9, 4)), rng.normal(0.3, 1.2, size=(9, 4))

  def kernel(x, y):
    return (sum(x * y) / 4 + 1) ** 3

  within = sum(kernel(*pair) for x in (a, b) for pair in itertools.permutations(x, 2)) / (9 * 8)
  across = np.mean([kernel(x, y) for x in a for y in b])
  found = sample_quality.kernel_distance(a, b, subsets=3, subset_size=9)
  np.testing.assert_allclose(found, (within - 2 * across, 0), atol=1e-12)


def test_kernel_distance_is_zero_on_average_and_grows_with_the_distance():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 400, 8)).astype(np.float32)
  means = [sample_quality.kernel_distance(a, b + shift, 50, 200)[0] for shift in (0, 0.2, 0.4)]
  assert abs(means[0]) < 0.02 < means[1] < means[2]


@pytest.mark.parametrize('classes', [2, 7])
def test_inception_score_of_certain_and_of_clueless_classifiers(classes):
  certain = 2000.0 * np.eye(classes)[np.arange(10 * classes) % classes]  # exp(-2000) is 0
  found = sample_quality.inception_score(certain, 10, seed=None)
  np.testing.assert_allclose(found, (classes, 0), atol=1e-12)
  found = sample_quality.inception_score(np.full((30, classes), 123.0))
  np.testing.assert_allclose(found, (1, 0), atol=1e-12)


def test_inception_score_is_its_definition():
  logits = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(1, keepdims=True)
  halves = [p[:5], p[5:]]
  scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in halves]
  found = sample_quality.inception_score(logits, 2, seed=None)
  np.testing.assert_allclose(found, (np.mean(scores), np.std(scores)), rtol=1e-6)
  assert sample_quality.inception_score(logits, 2) != found  # other images in the halves
  # A constant added to an image's logits changes nothing.
  np.testing.assert_allclose(
    sample_quality.inception_score(logits.astype(float) + 9, 2, None), found, rtol=1e-6
  )


def direct_precision_recall(real, generated, neighbours):
  def distances(x, y):
    return ((x[:, None] - y) ** 2).sum(-1)

  def share(x, points):
    radii = np.sort(distances(points, points))[:, neighbours]
    return (distances(x, points) <= radii).any(1).mean()

  real, generated = (np.asarray(s, np.float64) for s in (real, generated))
  return share(generated, real), share(real, generated)


@pytest.mark.parametrize('neighbours,chunk', [(1, 1000), (3, 64), (5, 70)])
def test_precision_and_recall_are_their_definition(neighbours, chunk):
  rng = np.random.default_rng(0)
  real, generated = rng.normal(size=(210, 6)), rng.normal(0.5, 0.8, size=(150, 6))
  expected = direct_precision_recall(real, generated, neighbours)
  assert 0.2 < expected[1] < expected[0] < 1
  found = sample_quality.precision_recall(real, generated, neighbours, chunk)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_precision_and_recall_of_points_on_a_line():
  """Balls of one neighbour around 0, 1, 3: radii 1, 1, 2. Around 5 and 9: 4 and 4."""
  real, generated = (np.array(x, np.float32)[:, None] for x in ([0, 1, 3], [5, 9]))
  # 5 is on the surface of the ball around 3, and 1 of that around 5.
  assert sample_quality.precision_recall(real, generated, 1) == (0.5, pytest.approx(2 / 3))
  nearly = np.nextafter(generated, np.float32(6))
  assert sample_quality.precision_recall(real, nearly, 1) == (0, pytest.approx(1 / 3))


def test_distances_survive_features_far_from_zero():
  """Two narrow clusters, far from each other and from zero: in float32 a product of features
  leaves nothing of the distances within a cluster."""
  rng = np.random.default_rng(0)
  where = 1e4 * np.arange(1, 3).repeat(60)[:, None]
  real, generated = (
    (where + spread * rng.normal(size=(120, 16))).astype(np.float32) for spread in (1, 0.9)
  )
  expected = direct_precision_recall(real, generated, 3)
  assert 0.1 < expected[1] < expected[0] < 1
  found = sample_quality.precision_recall(real, generated, 3, chunk=50)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_copies_are_in_each_others_balls():
  """Balls of no radius, around more copies than are candidates, hold nothing but the copies."""
  rng = np.random.default_rng(0)
  image = rng.normal(1e3, 1, size=(1, 32)).astype(np.float32)
  copies, others = image.repeat(40, 0), rng.normal(1e3, 1, size=(30, 32)).astype(np.float32)
  assert sample_quality.precision_recall(copies, copies) == (1, 1)
  one_of_them = np.concatenate([others, image])
  assert sample_quality.precision_recall(copies, one_of_them) == (pytest.approx(1 / 31), 1)
  assert sample_quality.precision_recall(copies, np.nextafter(copies, np.float32(0))) == (0, 0)


def test_a_set_covers_itself():
  features = jnp.asarray(np.random.default_rng(0).normal(size=(100, 300)), jnp.float32)
  assert sample_quality.precision_recall(features, features[::-1], chunk=30) == (1, 1)


def test_too_few_images_are_refused():
  few = np.zeros((3, 2))
  with pytest.raises(ValueError, match='subsets of 1000 from 3 and 3'):
    sample_quality.kernel_distance(few, few)
  with pytest.raises(ValueError, match='10 splits of 3 images'):
    sample_quality.inception_score(few)
  with pytest.raises(ValueError, match='3 neighbours in sets of 3 and 3'):
    sample_quality.precision_recall(few, few)
