"""What the programs that judge samples have in common."""

import dataclasses

import jax
import numpy as np

from farmer_jax import api
from farmer_jax import config as config_lib
from farmer_jax.data import base, sources
from farmer_jax.evaluation import classifier, feature_statistics
from farmer_jax.nn import farmer
from farmer_jax.workdir import layout


def load(path):
  """Configuration, model, parameters and folder of a trained run."""
  workdir = layout.absolute(path)
  config = config_lib.from_config_dict(layout.read_config(workdir))
  model = farmer.build(config)
  params, _ = api.load_params(config, workdir, model)
  return config, model, params, workdir


def with_sampling(config, **changes):
  """The configuration with other settings of sampling."""
  return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **changes))


class Judge:
  """A classifier of a run's real images, and the Fréchet distance in its features."""

  def __init__(self, config, workdir):
    train, valid = (sources.load(config.data, split) for split in ('train', 'valid'))
    self.images = valid.gather(np.arange(len(valid)))
    folder, contents = workdir / 'fidelity', base.contents(train)
    network, params, _ = classifier.load_or_train(config.data, train, folder, contents)
    self._extract = feature_statistics.Extractor(network, params, 1000)
    self._reference = self._statistics(self.images['image'])
    self.accuracy = self._accuracy(self._reference, self.images['label'])
    same = train.gather(np.arange(len(valid)))
    self.floor = self(same['image'], same['label'])[1]

  def __call__(self, images, labels):  # uint8 [n, H, W, C], int [n]
    """How often the classifier sees the class, and the distance to the held-out images."""
    found = self._statistics(images)
    distance = feature_statistics.frechet_distance(found.pool, self._reference.pool)
    return self._accuracy(found, labels), distance

  def _statistics(self, images):
    return self._extract(images.__getitem__, len(images), 0, 'images')

  def _accuracy(self, statistics, labels):
    return (statistics.logits.argmax(-1) == labels).mean()


def draw(sampler, params, labels, batch):
  """Images 0, 1, … of the classes `labels`, uint8, and how many are not finite."""
  images, broken = [], 0
  for start in range(0, len(labels), batch):
    numbers = np.arange(start, min(start + batch, len(labels)))
    samples = jax.device_get(sampler(params, labels[numbers], numbers))
    images.append(samples.images)
    broken += int((~samples.finite).sum())
  return np.concatenate(images), broken
