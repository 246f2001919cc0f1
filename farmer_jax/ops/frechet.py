"""Distances between sets of images, from their features. NumPy, float64."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
  """Count, mean [D] and scatter [D, D] (sum of outer products of deviations) of features."""

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @classmethod
  def of(cls, features):  # [n, D]
    """The moments of a batch."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    return cls(len(features), mean, (features - mean).T @ (features - mean))

  def __add__(self, other):
    """The moments of both batches together. Deviations are taken from each batch's own mean (Chan,
    Golub and LeVeque 1979): sums of raw squares would cancel."""
    count = self.count + other.count
    difference = other.mean - self.mean
    mean = self.mean + difference * (other.count / count)
    between = np.outer(difference, difference) * (self.count * other.count / count)
    return Moments(count, mean, self.scatter + other.scatter + between)

  @property
  def covariance(self):
    """Unbiased covariance, [D, D]."""
    return self.scatter / (self.count - 1)


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
  """Squared Fréchet (2-Wasserstein) distance of two Gaussians (arXiv 1706.08500).

  |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The trace of the root is the sum of singular
  values of C_a^(1/2) C_b^(1/2): no root of an unsymmetric matrix, and singular covariances do no
  harm.
  """
  roots = [_square_root(np.asarray(c, np.float64)) for c in (covariance_a, covariance_b)]
  trace_of_root = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
  difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
  traces = np.trace(covariance_a) + np.trace(covariance_b)
  return float(difference @ difference + traces - 2 * trace_of_root)


def _square_root(covariance):
  values, vectors = np.linalg.eigh(covariance)
  return vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
