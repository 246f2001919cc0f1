"""`--job=fidelity`: how close samples are to real images."""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Callable

import jax
import numpy as np

from farmer_jax import config as config_lib
from farmer_jax import errors, terminal
from farmer_jax.data import base, sources
from farmer_jax.evaluation import classifier, feature_statistics, inception
from farmer_jax.jobs import sample
from farmer_jax.workdir import layout
from farmer_jax.xla import host

# Settings that have no say in the figures.
_NOT_IN_NAME = {'name', 'samples', 'count', 'weights', 'batch_size'}

# What figures in features of a classifier are called: nobody should take them for those of
# Inception.
_CLASSIFIER_NAMES = {
  'fid': 'classifier_frechet_distance',
  'inception_score': 'classifier_score',
  'inception_score_std': 'classifier_score_std',
}


def run(config, workdir):
  """Draws what samples are missing and compares them with real images; writes
  WORKDIR/fidelity/<name>.json and prints the figures."""
  workdir = layout.open_run(config, workdir)
  host.cache_compilations(workdir)
  settings, folder = config.fidelity, workdir / 'fidelity'
  path = settings.samples
  if path is None and jax.process_count() > 1:
    path = _draw(config, workdir)  # All draw; the first then looks at the images, alone.
  if jax.process_index():
    return
  judge = Judge.load(config, folder)
  reference, reference_name = load_reference(config, judge, folder)
  if path is None:  # Drawn last: what is wrong with the rest shows before that.
    path = _draw(config, workdir)
  samples = judge.suited(ImageSet.open(path, config)).first(settings.count)
  drawn = {} if settings.samples else json.loads((path / sample.REPORT_FILE).read_text())
  statistics = judge.statistics(samples, 'samples', settings.compared)
  figures = feature_statistics.compare(statistics, reference, settings.neighbours)
  report = {
    'samples': samples.name,
    'count': len(samples),
    'reference': reference_name,
    'network': judge.name,
    **judge.figures(figures, statistics, samples.labels),
    **{n: drawn[n] for n in ('checkpoint_step', 'nonfinite_samples', 'sampling') if n in drawn},
    'settings': dataclasses.asdict(settings),
  }
  folder.mkdir(parents=True, exist_ok=True)
  # Paths may end in the same name.
  name = samples.name
  if settings.samples is not None:
    name += f'-{layout.fingerprint(layout.absolute(settings.samples))}'
  stem = layout.results_name(f'{name}-{len(samples)}', settings, _NOT_IN_NAME)
  file = folder / f'{settings.name or stem}.json'
  layout.write_atomically(file, json.dumps(report, indent=2) + '\n')
  _print_report(report, file)


def _draw(config, workdir):
  """Draws what is missing of the samples; returns their folder."""
  settings = dataclasses.replace(
    config.sampling, count=config.fidelity.count, figures=False, png=False
  )
  return sample.run(dataclasses.replace(config, sampling=settings), workdir)


def load_reference(config, judge, folder):
  """The `feature_statistics.Statistics` to compare with, and their name; those of images are kept in
  `folder`."""
  settings, statistics = config.fidelity, None
  if settings.reference is None:
    source = sources.load(config.data, settings.split)
    images = ImageSet.of(source, f'{config.data.source} ({settings.split})')
  else:
    path = layout.absolute(settings.reference)
    arrays = _read_npz(path) if path.suffix == '.npz' else ()
    if 'mu' in arrays:
      try:
        loaded = feature_statistics.load(arrays)
      except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise errors.ConfigError(f'cannot read {path}: {error}') from error
      statistics = judge.checked(loaded)
      if 'arr_0' not in arrays:
        return statistics, path.name
    images = judge.suited(ImageSet.open(path, config))
  found = judge.kept_statistics(images.first(settings.reference_count), settings, folder)
  if statistics is not None:  # What a file says of its images goes before what is found of them.
    found = dataclasses.replace(statistics, features=found.features)
  return found, images.name


class Judge:
  """A network whose features images are compared by.

  Args:
    name: 'inception' or 'classifier'.
    extractor: a `feature_statistics.Extractor`.
    channels: of its features.
    identity: what distinguishes it from other networks, in characters.
    side: of the images that it takes; None: any.
  """

  def __init__(self, name, extractor, channels, identity, side=None):
    self.name, self._extractor, self._channels = name, extractor, channels
    self._identity, self._side = identity, side
    self._accuracy = None  # of a classifier, on real images that it has not seen

  @classmethod
  def load(cls, config, folder):
    """The network that `config.fidelity` names; a classifier is trained and kept in `folder`."""
    settings, data = config.fidelity, config.data
    name = config_lib.fidelity_network(config)
    if name == 'inception':
      network, params, identity = inception.load(settings.weights)
      extractor = feature_statistics.Extractor(network, params, settings.batch_size)
      return cls(name, extractor, inception.CHANNELS, identity)
    train, valid = (sources.load(data, split) for split in ('train', 'valid'))
    network, params, identity = classifier.load_or_train(data, train, folder, base.contents(train))
    extractor = feature_statistics.Extractor(network, params, settings.batch_size)
    judge = cls(name, extractor, classifier.CHANNELS, identity, side=data.image_size)
    labels = np.concatenate(
      [valid.gather(part)['label'] for part in np.array_split(np.arange(len(valid)), 100)]
    )
    real = ImageSet.of(valid, 'held-out images')
    judge._accuracy = _accuracy(judge.statistics(real, real.name, 0), labels)
    return judge

  def statistics(self, images, what, kept, with_logits=True):
    """The `feature_statistics.Statistics` of an `ImageSet`."""
    return self._extractor(images.gather, len(images), kept, what, with_logits)

  def suited(self, images):
    """The `ImageSet`, if this network can look at it."""
    shape = images.gather(np.array([0])).shape[1:]
    if self._side not in (None, shape[0]):
      raise errors.ConfigError(
        f'the images of {images.name} are {shape[0]} × {shape[1]} pixels, and the classifier knows'
        f' {self._side} × {self._side}; set config.fidelity.network=inception'
      )
    return images

  def kept_statistics(self, images, settings, folder):
    """Those of real images, computed once and then read from `folder`."""
    about = self._identity, images.identity, len(images), settings.compared
    file = folder / f'reference-{layout.fingerprint(about)}.npz'
    if file.exists():
      return feature_statistics.load(_read_npz(file))
    statistics = self.statistics(images, 'real images', settings.compared, with_logits=False)
    folder.mkdir(parents=True, exist_ok=True)
    with layout.replacing(file) as temporary, temporary.open('wb') as opened:
      feature_statistics.save(opened, statistics)
    return statistics

  def checked(self, statistics):
    """The statistics, if they are of features of this network, by their number."""
    channels = len(statistics.pool.mean)
    if channels != self._channels:
      raise errors.ConfigError(
        f'config.fidelity.reference has statistics of {channels} features, and the {self.name} has'
        f' {self._channels}; set config.fidelity.network, or another reference'
      )
    return statistics

  def figures(self, figures, statistics, labels):
    """`figures` under names that say whose they are; of a classifier also how often it sees the
    class."""
    if self.name == 'inception':
      return figures
    named = {_CLASSIFIER_NAMES.get(n, f'classifier_{n}'): value for n, value in figures.items()}
    named['classifier_accuracy_on_real_images'] = self._accuracy
    if labels is not None and labels.max() < statistics.logits.shape[1]:  # or it is of no class
      named['classifier_accuracy'] = _accuracy(statistics, labels)
    return named


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Images to be looked at, in order."""

  name: str
  identity: object  # what tells the set from others
  gather: Callable  # gather(indices) -> uint8 [n, H, W, C]
  count: int
  labels: np.ndarray | None = None  # int [count]

  def __len__(self):
    return self.count

  def first(self, count):
    """The first images alone, or all."""
    count = min(count or self.count, self.count)
    labels = None if self.labels is None else self.labels[:count]
    return dataclasses.replace(self, count=count, labels=labels)

  @classmethod
  def of(cls, source, name):
    """The images of a `data.base.Source`."""
    labels = getattr(source, 'labels', None)
    identity = base.contents(source)
    return cls(name, identity, lambda indices: source.gather(indices)['image'], len(source), labels)

  @classmethod
  def open(cls, path, config):
    """The images at a path: an npz with `arr_0`, a folder of such files, or one of images."""
    path = layout.absolute(path)
    if not path.exists():
      raise errors.ConfigError(f'{path} does not exist; it should hold images to be compared')
    files = [path] if path.is_file() else sorted(path.glob('*.npz'))
    if not files:
      data = dataclasses.replace(
        config.data, source='folder', path=str(path), num_classes=0, valid_fraction=0.0
      )
      images = cls.of(sources.load(data, 'train'), path.name)
      return dataclasses.replace(images, labels=None)
    sizes = [_image_count(file) for file in files]
    labels = [_array(file, 'arr_1') for file in files]
    known = None if any(part is None for part in labels) else np.concatenate(labels)
    identity = [(str(file), file.stat().length, file.stat().mtime) for file in files]
    return cls(_name(path), identity, _Shards(files, sizes).gather, sum(sizes), known)


def _name(path):
  """A name for the images at a path: folders of samples may have dots in theirs."""
  return path.name.removesuffix('.npz')


def _image_count(file):
  """How many images an npz file has, of the kind that a network takes; they are not read."""
  try:
    with zipfile.ZipFile(file.open('rb')) as archive, archive.open('arr_0.npy') as member:
      if np.lib.format.read_magic(member) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
      else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(member)
  except KeyError:
    raise errors.ConfigError(
      f'{file} has no images (arr_0), nor statistics (mu and sigma)'
    ) from None
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise errors.ConfigError(f'cannot read {file}: {error}') from error
  if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or not shape[0]:
    raise errors.ConfigError(
      f'arr_0 of {file} is {dtype} {list(shape)}; images are uint8 [n, H, W, 1 or 3]'
    )
  return shape[0]


class _Shards:
  """Images in npz files, of which one is in memory at a time."""

  def __init__(self, files, sizes):
    self._files, self._ends = files, np.cumsum(sizes)
    self._read = functools.lru_cache(maxsize=1)(self._load)

  def _load(self, shard):
    return _read_npz(self._files[shard])['arr_0']

  def gather(self, indices):
    shards = np.searchsorted(self._ends, indices, side='right')
    starts = np.concatenate([[0], self._ends])
    return np.stack(
      [self._read(int(shard))[i - starts[shard]] for i, shard in zip(indices, shards, strict=True)]
    )


def _read_npz(path):
  """The arrays of an npz file, read one by one when asked for; no pickled objects."""
  try:
    return np.load(path.open('rb'), allow_pickle=False)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise errors.ConfigError(f'cannot read {path}: {error}') from error


def _array(path, name):
  """An array of an npz file, or None."""
  try:
    return _read_npz(path).get(name)
  except (ValueError, EOFError, zipfile.BadZipFile) as error:
    raise errors.ConfigError(f'cannot read {path}: {error}') from error


def _accuracy(statistics, labels):
  return float((statistics.logits.argmax(-1) == labels).mean())


def _print_report(report, file):
  terminal.say(
    f'{report["count"]} samples against {report["reference"]}, seen by {report["network"]}'
  )
  for name, value in report.items():
    if isinstance(value, float):
      print(f'{name:36} {value:.4f}')
  if report.get('nonfinite_samples'):
    print(f'Not finite: {report["nonfinite_samples"]} samples')
  print(file)
