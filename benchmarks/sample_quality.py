"""Measures sample quality with the features of a classifier, for several benchmarks."""

from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from farmer_jax import config as config_lib
from farmer_jax import sampling
from farmer_jax.data import sources
from farmer_jax.evaluation import feature_networks, feature_statistics, image_sets
from farmer_jax.ops import sample_quality

_BATCH_SIZE = 1000  # of the classifier
_MAX_FEATURES = 10_000  # images for precision and recall

Images = UInt8[np.ndarray, 'n H W C']
Labels = Int[np.ndarray, 'n']


class Quality(NamedTuple):
  """Quality of samples by the features of a classifier."""

  accuracy: float  # fraction of samples that the classifier recognizes
  distance: float  # Fréchet distance
  precision: float
  recall: float


class SampleEvaluator:
  """Compares samples with images of a data set, by default with the held-out images.

  `images` is a batch of all held-out images. `accuracy` is the accuracy of the classifier on these
  images.
  """

  def __init__(self, data: config_lib.Data, folder: epath.Path, reference: str = 'valid') -> None:
    """Trains the classifier of the data, or loads it from `folder`. `reference` is the split."""
    self._network = feature_networks.load_classifier(data, folder, _BATCH_SIZE)
    self._train, valid = (sources.load(data, split) for split in ('train', 'valid'))
    self.images = valid.gather(np.arange(len(valid)))
    source, self._others = self._train, self.images
    if reference == 'valid':
      source, self._others = valid, self.training_images(len(valid))
    self._reference = self._statistics(image_sets.from_source(source, reference))
    self.accuracy = self._network.accuracy

  def training_images(self, count: int) -> dict[str, np.ndarray]:
    """Returns a batch of `count` training images, evenly spread over the training split."""
    return self._train.gather(np.linspace(0, len(self._train) - 1, count).astype(int))

  def real_images(self) -> Quality:
    """Compares real images of the other split with the reference: what perfect samples reach."""
    return self(self._others['image'], self._others['label'])

  def __call__(self, images: Images, labels: Labels) -> Quality:
    """Compares samples of the given classes with the reference."""
    samples = image_sets.ImageSet('samples', None, images.__getitem__, len(images))
    statistics = self._statistics(samples)
    distance = sample_quality.frechet_distance(statistics.pool, self._reference.pool)
    features = self._reference.features, statistics.features
    accuracy = feature_networks.accuracy(statistics, labels)
    return Quality(accuracy, distance, *sample_quality.precision_recall(*features))

  def _statistics(self, images: image_sets.ImageSet) -> feature_statistics.Statistics:
    return self._network.statistics(images, images.name, _MAX_FEATURES)


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
