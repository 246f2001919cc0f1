"""How close two sets of images are, and how varied one is, from their features and logits.

With their defaults these are torch-fidelity's KID, Inception Score, precision and recall, to the
same random subsets.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Points beside the neighbours whose distances are computed to choose the neighbours among them.
_SPARE = 12


def kernel_distance(features_a, features_b, subsets=100, subset_size=1000, seed=2020):
  """Kernel (Inception) distance: unbiased squared MMD with the kernel (x·y / D + 1)³, float64
  (arXiv 1801.01401).

  Args:
    features_a: [n, D].
    features_b: [m, D].
    subsets: how many pairs of random subsets are compared.
    subset_size: images in each of them; at most n and m.
    seed: of the subsets.

  Returns:
    Mean and standard deviation over the pairs of subsets. The mean may be just below 0.

  Raises:
    ValueError: there are fewer features than `subset_size`.
  """
  features = [np.asarray(f) for f in (features_a, features_b)]
  if not 2 <= subset_size <= min(map(len, features)):
    raise ValueError(f'subsets of {subset_size} from {len(features[0])} and {len(features[1])}')
  rng = np.random.RandomState(seed)
  distances = [
    _squared_mmd(*(f[rng.choice(len(f), subset_size, replace=False)] for f in features))
    for _ in range(subsets)
  ]
  return float(np.mean(distances)), float(np.std(distances))


def _squared_mmd(a, b):  # [n, D] each
  n, d = a.shape
  a, b = a.astype(np.float64), b.astype(np.float64)
  within, across = ((x @ x.T / d + 1) ** 3 for x in (a, b)), (a @ b.T / d + 1) ** 3
  return sum(k.sum() - np.trace(k) for k in within) / (n * (n - 1)) - 2 * across.mean()


def inception_score(logits, splits=10, seed=2020):
  """exp of the mean KL divergence from images' class probabilities to their mean, float64
  (arXiv 1606.03498).

  Args:
    logits: [n, classes], of all images.
    splits: parts that are scored on their own.
    seed: of the order in which images are dealt to the splits; None leaves them in their own, as
      ADM's evaluation does.

  Returns:
    Mean and standard deviation over the splits.

  Raises:
    ValueError: there are fewer images than splits.
  """
  logits, n = np.asarray(logits, np.float64), len(logits)
  if not 1 <= splits <= n:
    raise ValueError(f'{splits} splits of {n} images')
  if seed is not None:
    logits = logits[np.random.RandomState(seed).permutation(n)]
  log_p = logits - _log_sum_exp(logits, 1)
  scores = []
  for i in range(splits):
    part = log_p[i * n // splits : (i + 1) * n // splits]
    log_mean = _log_sum_exp(part, 0) - np.log(len(part))
    scores.append(np.exp((np.exp(part) * (part - log_mean)).sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def _log_sum_exp(x, axis):
  shift = x.max(axis, keepdims=True)
  return shift + np.log(np.exp(x - shift).sum(axis, keepdims=True))


def precision_recall(real, generated, neighbours=3, chunk=1000):
  """Improved precision and recall (arXiv 1904.06991).

  Each image of a set has a ball around it that reaches to its k-th nearest neighbour in the set.
  Precision is the share of generated images in a ball of a real one, recall that of real images in
  a ball of a generated one. The surface belongs to a ball. Distances are those of float32 numbers
  subtracted one by one, so that equal images are at a distance of 0.

  Args:
    real: features, [n, D].
    generated: features, [m, D].
    neighbours: k.
    chunk: images whose distances to all others are in memory at a time.

  Returns:
    Precision and recall.

  Raises:
    ValueError: a set has no more than `neighbours` images.
  """
  real, generated = (jnp.asarray(f, jnp.float32) for f in (real, generated))
  if not 1 <= neighbours < min(len(real), len(generated)):
    raise ValueError(f'{neighbours} neighbours in sets of {len(real)} and {len(generated)}')
  inside = [_in_balls(*sets, neighbours, chunk) for sets in ((generated, real), (real, generated))]
  return float(inside[0].mean()), float(inside[1].mean())


def _in_balls(x, points, neighbours, chunk):
  """Whether each x, [n, D], is in a ball of the points, [m, D]; NumPy, bool [n]."""
  # Far from zero, products of features would leave nothing of the distances.
  centre, candidates = points.mean(0), min(len(points), neighbours + 1 + _SPARE)
  radii = _settled(
    functools.partial(_likely_radii, candidates=candidates, neighbours=neighbours),
    functools.partial(_sure_radius, neighbours=neighbours),
    *(points, chunk, points, centre),
  )
  likely = functools.partial(_likely_inside, candidates=candidates)
  return _settled(likely, _surely_inside, x, chunk, points, centre, jnp.asarray(radii))


def _settled(likely, sure, x, chunk, points, centre, *radii):
  """What `likely` says of each x, a chunk at a time, and `sure` of those that it leaves open."""
  chunk = min(chunk, len(x))
  results = []
  for start in range(0, len(x), chunk):
    # All chunks have one size, or each would be compiled for: the last begins among known results.
    first = min(start, len(x) - chunk)
    part, settled = map(np.array, likely(x[first : first + chunk], points, centre, *radii))
    for index in np.flatnonzero(~settled):
      part[index] = sure(x[first + index], points, *radii)
    results.append(part[start - first :])
  return np.concatenate(results)


@functools.partial(jax.jit, static_argnames=('candidates', 'neighbours'))
def _likely_radii(x, points, centre, candidates, neighbours):
  """Squared radii of the balls around x, [n], and whether they are exact, [n].

  The candidates that may be nearest are found by one matrix product; only theirs are distances. A
  radius is exact if no other point can be as near.
  """
  bounds, indices = jax.lax.top_k(-_lower_bounds(x, points, centre), candidates)
  distances = _squared_distances(x[:, None], points[indices])
  radii = jnp.sort(distances, -1)[:, neighbours]  # The nearest point is x itself.
  # The last of the bounds is their minimum; a slice would make XLA's CPU backend sort all points.
  return radii, (-bounds.min(-1) > radii) | (candidates == len(points))


@functools.partial(jax.jit, static_argnames='neighbours')
def _sure_radius(x, points, neighbours):
  return -jax.lax.top_k(-_squared_distances(x, points), neighbours + 1)[0][-1]


@functools.partial(jax.jit, static_argnames='candidates')
def _likely_inside(x, points, centre, radii, candidates):
  """Whether each x is in a ball, [n], and whether that is sure, [n]; as `_likely_radii`."""
  depths, indices = jax.lax.top_k(radii - _lower_bounds(x, points, centre), candidates)
  distances = _squared_distances(x[:, None], points[indices])
  inside = (distances <= radii[indices]).any(-1)
  return inside, inside | (depths.min(-1) < 0) | (candidates == len(points))


@jax.jit
def _surely_inside(x, points, radii):
  return (_squared_distances(x, points) <= radii).any()


def _squared_distances(x, y):
  return ((x - y) ** 2).sum(-1)


def _lower_bounds(x, points, centre):
  """Squared distances, [n, m], less what rounding can have added to them."""
  x, points = x - centre, points - centre
  rounding = (x.shape[-1] + 8) * jnp.finfo(jnp.float32).eps
  squares = (x**2).sum(-1)[:, None] + (points**2).sum(-1)
  return squares * (1 - rounding) - 2 * jnp.matmul(x, points.T, precision=jax.lax.Precision.HIGHEST)
