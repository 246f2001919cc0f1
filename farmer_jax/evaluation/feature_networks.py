"""Networks that compute features: Inception-v3, or a classifier of the training images."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import Array, UInt8

from farmer_jax import config as config_lib
from farmer_jax import terminal
from farmer_jax.data import sources
from farmer_jax.distributed import mesh
from farmer_jax.errors import ConfigError, DataError
from farmer_jax.evaluation import classifier, convert_inception, inception
from farmer_jax.evaluation import feature_statistics as statistics_lib
from farmer_jax.evaluation.feature_statistics import Outputs, Statistics
from farmer_jax.evaluation.image_sets import ImageSet, Labels, from_path, from_source, open_npz
from farmer_jax.ops import sample_quality
from farmer_jax.workdir import layout

# Metrics of classifier features are not comparable to metrics of Inception features, so their names
# differ.
_CLASSIFIER_NAMES = {
  'fid': 'classifier_frechet_distance',
  'inception_score': 'classifier_score',
  'inception_score_std': 'classifier_score_std',
}


@dataclasses.dataclass
class FeatureNetwork:
  """A network that computes features of images on all devices of this process.

  `name` is 'inception' or 'classifier'. `num_features` is the number of pool features of an image.
  `accuracy` is the accuracy of a classifier on held-out real images. A network with an
  `image_size`, in pixels, accepts no other size.
  """

  name: str
  apply: Callable[[Any, UInt8[Array, 'B H W C']], Outputs]
  params: dict[str, Any]
  num_features: int
  batch_size: int  # rounded up to a multiple of the number of devices
  image_size: int | None = None
  accuracy: float | None = None

  def __post_init__(self) -> None:
    self.identity = inception.checksum(traverse_util.flatten_dict(self.params, sep='/'))
    self._devices = mesh.LocalDevices()
    self._params = jax.device_put(self.params, self._devices.replicated)
    self._apply = jax.jit(self.apply)
    self._size = self._devices.round_up(self.batch_size)

  def statistics(
    self, images: ImageSet, description: str, max_features: int = 0, with_logits: bool = True
  ) -> Statistics:
    """Computes the statistics of images in one pass. A progress bar shows `description`.

    The result has the features of `max_features` images, which are evenly spread over the set.

    Raises:
      DataError: the network does not accept the size of the images.
    """
    height, width = images.gather(np.array([0])).shape[1:3]
    if self.image_size not in (None, height):
      raise DataError(
        f'the images of {images.name} have {height} × {width} pixels, but the classifier accepts'
        f' {self.image_size} × {self.image_size}; set --config.fidelity.network=inception'
      )
    moments: dict[str, sample_quality.Moments] = {}
    features, logits, count = [], [], len(images)
    is_sampled = np.zeros(count, bool)
    is_sampled[np.linspace(0, count - 1, min(max_features, count)).astype(int)] = True
    with terminal.progress_bar(f'features of {description}', 'image', count) as bar:
      for indices, outputs in self._outputs(images):
        for name, values in (('pool', outputs.pool), ('spatial', outputs.spatial)):
          if values is not None:
            batch = sample_quality.Moments.of(np.asarray(values))
            moments[name] = moments[name] + batch if name in moments else batch
        features.append(outputs.pool[is_sampled[indices]])
        if with_logits:
          logits.append(outputs.logits)
        bar.update(len(indices))
    all_logits = np.concatenate(logits) if with_logits else None
    return Statistics(**moments, features=np.concatenate(features), logits=all_logits)

  def _outputs(self, images: ImageSet) -> Iterator[tuple[np.ndarray, Outputs]]:
    """Yields indices and outputs of each batch while the devices compute the next batch."""
    size = self._size

    def compute(start: int) -> tuple[np.ndarray, Outputs]:
      indices = np.arange(start, min(start + size, len(images)))
      # The last batch is padded, so that the network compiles for one shape only.
      batch = self._devices.shard(images.gather(np.resize(indices, size)))
      return indices, self._apply(self._params, batch)

    computed: Iterator[Any] = map(compute, range(0, len(images), size))
    for (indices, outputs), _ in itertools.pairwise(itertools.chain(computed, [None])):
      without_padding = operator.itemgetter(slice(len(indices)))
      yield indices, jax.tree.map(without_padding, jax.device_get(outputs))

  def compare(
    self, samples: Statistics, reference: Statistics, neighbors: int, labels: Labels | None = None
  ) -> dict[str, float | None]:
    """Compares samples with real images. See `feature_statistics.compare`.

    A classifier adds its accuracy on held-out real images and, with the labels of the samples, the
    fraction of samples that it recognizes as their class.
    """
    compared = statistics_lib.compare(samples, reference, neighbors)
    if self.name == 'inception':
      return {**compared}
    metrics: dict[str, float | None] = {
      _CLASSIFIER_NAMES.get(name, f'classifier_{name}'): value for name, value in compared.items()
    }
    metrics['classifier_accuracy_on_real_images'] = self.accuracy
    # Samples without a class have the label `num_classes`.
    num_classes = 0 if samples.logits is None else samples.logits.shape[1]
    if labels is not None and labels.max() < num_classes:
      metrics['classifier_accuracy'] = accuracy(samples, labels)
    return metrics


def load(
  config: config_lib.Config, folder: epath.Path, class_names: Sequence[str] = ()
) -> FeatureNetwork:
  """Loads the network that `config.fidelity.network` selects.

  `folder` stores the trained classifier or the converted weights of Inception. The classifier
  predicts indices in `class_names`, the classes of the run.
  """
  if config.feature_network == 'inception':
    return load_inception(config.fidelity.weights, folder, config.fidelity.batch_size)
  return load_classifier(config.data, folder, config.fidelity.batch_size, class_names)


def load_inception(weights: str | None, folder: epath.Path, batch_size: int) -> FeatureNetwork:
  """Loads Inception-v3 from an npz file or a PyTorch file. `folder` stores converted weights.

  Raises:
    ConfigError: `weights` is None.
    DataError: the file is corrupt or belongs to another network.
  """
  if weights is None:
    raise ConfigError(
      'Inception-v3 needs weights: get'
      f' {convert_inception.PYTORCH_FILE} from the release fid_weights of'
      ' github.com/mseitzer/pytorch-fid, and set --config.fidelity.weights to its path'
    )
  path = layout.absolute(weights)
  if path.suffix != '.npz':
    path = convert_inception.convert_once(path, folder)
  arguments = inception.extract_features, inception.load(path), inception.NUM_FEATURES
  return FeatureNetwork('inception', *arguments, batch_size)


def load_classifier(
  data: config_lib.Data, folder: epath.Path, batch_size: int, class_names: Sequence[str] = ()
) -> FeatureNetwork:
  """Loads the classifier of the training images. Trains it if `folder` does not contain it."""
  train, valid = (sources.load(data, split, class_names) for split in ('train', 'valid'))
  module = classifier.Classifier(data.num_classes)

  def apply(params: Any, images: UInt8[Array, 'B H W C']) -> Outputs:
    outputs: Any = module.apply({'params': params}, images)
    return outputs

  params = classifier.load_or_train(data, train, folder)
  network = FeatureNetwork(
    'classifier', apply, params, classifier.NUM_FEATURES, batch_size, data.image_size
  )
  held_out = network.statistics(from_source(valid, 'valid'), 'held-out images')
  chunks = np.array_split(np.arange(len(valid)), 100)
  labels = np.concatenate([valid.gather(indices)['label'] for indices in chunks])
  network.accuracy = accuracy(held_out, labels)
  return network


def load_reference(
  config: config_lib.Config, network: FeatureNetwork, folder: epath.Path
) -> tuple[Statistics, str]:
  """Returns the statistics and the name of the real images `config.fidelity.reference`.

  `folder` stores computed statistics.

  Raises:
    DataError: the reference cannot be read, or its statistics belong to another network.
  """
  fidelity = config.fidelity
  if fidelity.reference is None:
    source = sources.load(config.data, fidelity.reference_split)
    name = f'{config.data.source} ({fidelity.reference_split})'
    return _of_real_images(from_source(source, name), network, fidelity, folder), name
  path = layout.absolute(fidelity.reference)
  arrays = open_npz(path) if path.suffix == '.npz' else {}
  if 'mu' not in arrays:
    images = from_path(path, config.data)
    return _of_real_images(images, network, fidelity, folder), images.name
  statistics = statistics_lib.load(path, arrays)
  num_features = len(statistics.pool.mean)
  if num_features != network.num_features:
    raise DataError(
      f'--config.fidelity.reference={path} has statistics of {num_features} features, but the'
      f' {network.name} network has {network.num_features}; change --config.fidelity.network or'
      ' --config.fidelity.reference'
    )
  if 'arr_0' not in arrays:
    return statistics, path.name
  # ADM's reference batches contain statistics of a full dataset, and some images of the dataset.
  # The moments come from the statistics. KID, precision and recall need features of images.
  images = from_path(path, config.data)
  features = _of_real_images(images, network, fidelity, folder).features
  return dataclasses.replace(statistics, features=features), images.name


def _of_real_images(
  images: ImageSet, network: FeatureNetwork, fidelity: config_lib.Fidelity, folder: epath.Path
) -> Statistics:
  """Computes statistics without logits, or reads them from `folder` after the first call."""
  images = images.first(fidelity.reference_count)
  key = network.identity, images.identity, len(images), fidelity.pairwise_images
  file = folder / f'reference-{layout.short_hash(key)}.npz'
  if file.exists():
    return statistics_lib.load(file, open_npz(file))
  statistics = network.statistics(
    images, 'real images', fidelity.pairwise_images, with_logits=False
  )
  statistics_lib.save(file, statistics)
  return statistics


def accuracy(statistics: Statistics, labels: Labels) -> float:
  """Returns the fraction of images whose largest logit belongs to their label."""
  assert statistics.logits is not None
  return float((statistics.logits.argmax(-1) == labels).mean())
