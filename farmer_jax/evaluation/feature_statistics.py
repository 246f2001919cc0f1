"""Statistics of the features of a set of images, and distances between two sets.

Axes: B batch, n images, k selected images, D features, S spatial features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from farmer_jax.errors import DataError
from farmer_jax.evaluation import image_sets
from farmer_jax.ops import sample_quality
from farmer_jax.workdir import layout


@flax.struct.dataclass
class Outputs:
  """Outputs of a feature network. Only Inception has spatial features, which keep positions."""

  pool: Float[Array, 'B D']
  logits: Float[Array, 'B classes']
  spatial: Float[Array, 'B S'] | None = None


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Moments of the features of a set of images, pool features of k images, logits of all images.

  The Fréchet distance needs only `pool`. Published reference statistics often have nothing else.
  """

  pool: sample_quality.Moments
  spatial: sample_quality.Moments | None = None
  features: Float[np.ndarray, 'k D'] | None = None
  logits: Float[np.ndarray, 'n classes'] | None = None


def compare(generated: Statistics, reference: Statistics, neighbors: int = 3) -> dict[str, float]:
  """Compares generated images with real images. Precision and recall use k = `neighbors`.

  Returns:
    `fid` and, with spatial features, `sfid`: Fréchet distances of pool and of spatial features.
    `inception_score` and `inception_score_std` of the generated images, if they have logits.
    `kid`, `kid_std`, `precision` and `recall`, if both sets have features.
  """
  metrics = {'fid': sample_quality.frechet_distance(generated.pool, reference.pool)}
  if generated.spatial is not None and reference.spatial is not None:
    metrics['sfid'] = sample_quality.frechet_distance(generated.spatial, reference.spatial)
  if generated.logits is not None:
    score, std = sample_quality.inception_score(generated.logits)
    metrics |= {'inception_score': score, 'inception_score_std': std}
  if generated.features is not None and reference.features is not None:
    samples, real = generated.features, reference.features
    size = min(1000, len(samples), len(real))
    distance, std = sample_quality.kernel_distance(samples, real, subset_size=size)
    precision, recall = sample_quality.precision_recall(real, samples, neighbors)
    metrics |= {'kid': distance, 'kid_std': std, 'precision': precision, 'recall': recall}
  return metrics


def save(path: epath.Path, statistics: Statistics) -> None:
  """Writes statistics as an npz file. Other tools can read the arrays mu, sigma, mu_s, sigma_s."""
  arrays: dict[str, Any] = {'count': statistics.pool.count}
  for suffix, moments in (('', statistics.pool), ('_s', statistics.spatial)):
    if moments is not None:
      arrays |= {f'mu{suffix}': moments.mean, f'sigma{suffix}': moments.covariance}
  optional = {'features': statistics.features, 'logits': statistics.logits}
  layout.write_npz(path, arrays | {n: a for n, a in optional.items() if a is not None})


def load(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> Statistics:
  """Reads statistics from the arrays of the npz file at `path`.

  `save` wrote the file, or it has at least `mu` and `sigma`, like a reference batch of ADM
  (github.com/openai/guided-diffusion).

  Raises:
    DataError: the file is corrupt or lacks an array.
  """
  try:
    count = int(arrays['count']) if 'count' in arrays else 2

    def moments(suffix: str) -> sample_quality.Moments:
      mean, covariance = (np.asarray(arrays[n + suffix], np.float64) for n in ('mu', 'sigma'))
      return sample_quality.Moments(count, mean, covariance * (count - 1))

    optional = {name: arrays[name] for name in ('features', 'logits') if name in arrays}
    if not all(np.isfinite(arrays[n]).all() for n in {'mu', 'sigma'}.union(optional)):
      raise ValueError('it contains values that are not finite')
    return Statistics(moments(''), moments('_s') if 'mu_s' in arrays else None, **optional)
  except (*image_sets.NPZ_ERRORS, KeyError) as error:
    raise DataError(f'cannot read the statistics in {path}: {error}') from error
