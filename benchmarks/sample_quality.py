"""Measures sample quality with the features of a classifier, for several benchmarks."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from farmer_jax import config as config_lib
from farmer_jax import sampling
from farmer_jax.data import sources
from farmer_jax.evaluation import feature_networks, image_sets
from farmer_jax.ops import sample_quality

_BATCH_SIZE = 1000  # of the classifier

Images = UInt8[np.ndarray, 'n H W C']
Labels = Int[np.ndarray, 'n']


class SampleEvaluator:
  """Compares samples with the held-out images of a run.

  `images` is a batch of all held-out images. `accuracy` is the accuracy of the classifier on these
  images. `training_distance` is the Fréchet distance of the same number of training images.
  """

  def __init__(self, config: config_lib.Config, workdir: epath.Path) -> None:
    """Trains the classifier of the run, or loads it from WORKDIR/fidelity."""
    self._network = feature_networks.load_classifier(config.data, workdir / 'fidelity', _BATCH_SIZE)
    train, valid = (sources.load(config.data, split) for split in ('train', 'valid'))
    self.images = valid.gather(np.arange(len(valid)))
    self._reference = self._network.statistics(image_sets.from_source(valid, 'valid'), 'images')
    self.accuracy = self._network.accuracy
    training_images = train.gather(np.arange(len(valid)))
    _, self.training_distance = self(training_images['image'], training_images['label'])

  def __call__(self, images: Images, labels: Labels) -> tuple[float, float]:
    """Returns the accuracy of the classifier on samples, and the Fréchet distance."""
    samples = image_sets.ImageSet('samples', None, images.__getitem__, len(images))
    statistics = self._network.statistics(samples, 'samples')
    distance = sample_quality.frechet_distance(statistics.pool, self._reference.pool)
    return feature_networks.accuracy(statistics, labels), distance


def draw(
  sampler: sampling.Sampler, params: Any, labels: Labels, batch_size: int
) -> tuple[Images, int]:
  """Draws image i with labels[i]. Returns all images and the number of non-finite images."""
  images, nonfinite = [], 0
  for start in range(0, len(labels), batch_size):
    indices = np.arange(start, min(start + batch_size, len(labels)))
    samples = jax.device_get(sampler(params, labels[indices], indices))
    images.append(samples.images)
    nonfinite += int((~samples.finite).sum())
  return np.concatenate(images), nonfinite
