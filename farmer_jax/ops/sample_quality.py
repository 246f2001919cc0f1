"""Distances between two sets of images and diversity of one set, from features and logits.

With default arguments, the functions compute the KID, Inception Score, precision and recall of
torch-fidelity, with the same random subsets. Axes: n and m images, D features.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# For each image, exact distances to this many points are computed, in addition to those needed.
_EXTRA_CANDIDATES = 12

Features = Float[np.ndarray, 'n D']
Matrix = Float[np.ndarray, 'D D']
Set = Float[Array, 'n D']
Points = Float[Array, 'm D']
Point = Float[Array, 'D']


@dataclasses.dataclass(frozen=True)
class Moments:
  """Moments of the features of `count` images.

  `scatter` is the sum of outer products of the deviations from the mean.
  """

  count: int
  mean: Float[np.ndarray, 'D']
  scatter: Matrix

  @classmethod
  def of(cls, features: Features) -> 'Moments':
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    return cls(len(features), mean, (features - mean).T @ (features - mean))

  def __add__(self, other: 'Moments') -> 'Moments':
    """Returns the moments of the union of two sets (Chan, Golub and LeVeque 1979)."""
    count = self.count + other.count
    difference = other.mean - self.mean
    mean = self.mean + difference * (other.count / count)
    between = np.outer(difference, difference) * (self.count * other.count / count)
    return Moments(count, mean, self.scatter + other.scatter + between)

  @property
  def covariance(self) -> Matrix:  # unbiased
    return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
  """Returns the squared Fréchet (2-Wasserstein) distance of two Gaussians (arXiv 1706.08500).

  |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The trace of the square root is the sum of the
  singular values of C_a^(1/2) C_b^(1/2), which may be singular.
  """
  roots = _square_root(a.covariance) @ _square_root(b.covariance)
  trace_of_root = np.linalg.svd(roots, compute_uv=False).sum()
  difference, traces = a.mean - b.mean, np.trace(a.covariance) + np.trace(b.covariance)
  return float(difference @ difference + traces - 2 * trace_of_root)


def _square_root(covariance: Matrix) -> Matrix:
  values, vectors = np.linalg.eigh(covariance)
  return vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T


def kernel_distance(
  features_a: Features,
  features_b: Float[np.ndarray, 'm D'],
  subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 2020,
) -> tuple[float, float]:
  """Computes the Kernel Inception Distance (arXiv 1801.01401) in float64.

  It is the unbiased squared MMD with the kernel (x·y / D + 1)³. Returns the mean and the standard
  deviation over pairs of random subsets. The mean can be slightly negative.

  Raises:
    ValueError: `subset_size` is less than 2 or larger than a set.
  """
  features = [np.asarray(f) for f in (features_a, features_b)]
  if not 2 <= subset_size <= min(map(len, features)):
    raise ValueError(
      f'cannot draw subsets of {subset_size} from {len(features[0])} and {len(features[1])} images'
    )
  rng = np.random.RandomState(seed)
  distances = [
    _squared_mmd(*(f[rng.choice(len(f), subset_size, replace=False)] for f in features))
    for _ in range(subsets)
  ]
  return float(np.mean(distances)), float(np.std(distances))


def _squared_mmd(a: Features, b: Features) -> float:
  n, d = a.shape
  a, b = a.astype(np.float64), b.astype(np.float64)
  within, across = ((x @ x.T / d + 1) ** 3 for x in (a, b)), (a @ b.T / d + 1) ** 3
  return sum(k.sum() - np.trace(k) for k in within) / (n * (n - 1)) - 2 * across.mean()


def inception_score(
  logits: Float[np.ndarray, 'n classes'], splits: int = 10, seed: int | None = 2020
) -> tuple[float, float]:
  """Computes the Inception Score (arXiv 1606.03498) in float64.

  The score is exp of the mean KL divergence between the class probabilities of an image and the
  mean class probabilities. Returns the mean and the standard deviation over `splits` subsets.
  `seed` shuffles the images before the split. None does not shuffle, like ADM's evaluation.

  Raises:
    ValueError: `splits` is less than 1 or larger than the number of images.
  """
  logits, n = np.asarray(logits, np.float64), len(logits)
  if not 1 <= splits <= n:
    raise ValueError(f'cannot make {splits} splits of {n} images')
  if seed is not None:
    logits = logits[np.random.RandomState(seed).permutation(n)]
  log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
  scores = []
  for i in range(splits):
    part = log_p[i * n // splits : (i + 1) * n // splits]
    log_mean = np.logaddexp.reduce(part) - np.log(len(part))
    scores.append(np.exp((np.exp(part) * (part - log_mean)).sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
  real: Float[Array | np.ndarray, 'n D'],
  generated: Float[Array | np.ndarray, 'm D'],
  neighbors: int = 3,
  chunk_size: int = 1000,
) -> tuple[float, float]:
  """Computes improved precision and recall (arXiv 1904.06991).

  Each image of a set is the center of a ball that extends to its nearest neighbor of rank
  `neighbors` in the set. Precision is the fraction of generated images inside a ball of a real
  image. Recall is the fraction of real images inside a ball of a generated image. A ball includes
  its surface. Distances are sums of squared float32 differences, so equal images have distance 0.
  The distances of `chunk_size` images to all other images are in memory at a time.

  Raises:
    ValueError: `neighbors` is less than 1, or a set has at most `neighbors` images.
  """
  real, generated = jnp.asarray(real, jnp.float32), jnp.asarray(generated, jnp.float32)
  if not 1 <= neighbors < min(len(real), len(generated)):
    raise ValueError(f'no {neighbors} neighbors in sets of {len(real)} and {len(generated)} images')
  precision = _in_balls(generated, real, neighbors, chunk_size).mean()
  recall = _in_balls(real, generated, neighbors, chunk_size).mean()
  return float(precision), float(recall)


def _in_balls(x: Set, points: Points, neighbors: int, chunk_size: int) -> Bool[np.ndarray, 'n']:
  """Returns whether each x is inside a ball around one of the points."""
  # The nearest point is the center of the ball itself.
  radii = _kth_smallest(points, points, jnp.zeros(len(points)), neighbors, chunk_size)
  return _kth_smallest(x, points, jnp.asarray(radii), 0, chunk_size) <= 0


def _kth_smallest(
  x: Set, points: Points, offsets: Float[Array, 'm'], k: int, chunk_size: int
) -> Float[np.ndarray, 'n']:
  """Returns the value of rank k among |x - point|² - offset over all points, for each x.

  Exact distances of all pairs would take too long. A matrix product gives a lower bound of each
  value. The points with the lowest bounds are candidates, whose exact values are computed. If the
  bounds do not prove the result, the exact values of all points are computed.
  """
  chunk_size, candidates = min(chunk_size, len(x)), min(len(points), k + 1 + _EXTRA_CANDIDATES)
  results = []
  for start in range(0, len(x), chunk_size):
    # All chunks have one size, so that the functions compile once. The last may overlap another.
    first = min(start, len(x) - chunk_size)
    part, proven = map(
      np.array, _among_candidates(x[first : first + chunk_size], points, offsets, k, candidates)
    )
    for index in np.flatnonzero(~proven):
      part[index] = _among_all(x[first + index], points, offsets, k)
    results.append(part[start - first :])
  return np.concatenate(results)


@functools.partial(jax.jit, static_argnames=('k', 'candidates'))
def _among_candidates(
  x: Set, points: Points, offsets: Float[Array, 'm'], k: int, candidates: int
) -> tuple[Float[Array, 'n'], Bool[Array, 'n']]:
  """Returns the value of rank k among the candidates, and whether it is proven.

  It is proven if the lower bounds of all points that are not candidates are larger. Of values below
  0 only the sign matters, and no distance is below 0.
  """
  bounds, indices = jax.lax.top_k(offsets - _lower_bounds(x, points), candidates)
  values = _squared_distances(x[:, None], points[indices]) - offsets[indices]
  value = jnp.sort(values, -1)[:, k]
  # The minimum is the last entry. A slice would make XLA's CPU backend sort all points.
  return value, (-bounds.min(-1) > value) | (value <= 0) | (candidates == len(points))


@functools.partial(jax.jit, static_argnames='k')
def _among_all(x: Point, points: Points, offsets: Float[Array, 'm'], k: int) -> Float[Array, '']:
  return -jax.lax.top_k(offsets - _squared_distances(x, points), k + 1)[0][-1]


def _squared_distances(x: Float[Array, '... D'], y: Float[Array, '... D']) -> Float[Array, '...']:
  return ((x - y) ** 2).sum(-1)


def _lower_bounds(x: Set, points: Points) -> Float[Array, 'n m']:
  """Returns squared distances minus the largest possible rounding error."""
  # Without centering, the rounding errors of products would be larger than the distances.
  center = points.mean(0)
  x, points = x - center, points - center
  rounding = (x.shape[-1] + 8) * jnp.finfo(jnp.float32).eps
  squares = (x**2).sum(-1)[:, None] + (points**2).sum(-1)
  return squares * (1 - rounding) - 2 * jnp.matmul(x, points.T, precision=jax.lax.Precision.HIGHEST)
