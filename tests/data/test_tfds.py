"""TFDS data sets, read from ArrayRecord files that are written here without TensorFlow."""

import copy
import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from farmer_jax import config, errors
from farmer_jax.data import base, sources
from farmer_jax.data import tfds as tfds_source

BOTH = {
  'image': tfds.features.Image(shape=(None, None, 3)),
  'label': tfds.features.ClassLabel(names=['cat', 'dog', 'eel']),
}
IMAGES = {'image': tfds.features.Image(shape=(None, None, 3))}


def picture(value, kind='PNG', mode='RGB'):
  """An image file of one colour, in memory."""
  stream = io.BytesIO()
  PIL.Image.new('RGB', (7, 9), (value, value, value)).convert(mode).save(stream, kind)
  stream.seek(0)
  return stream


def prepare(root, name, features, splits, file_format='array_record'):
  """Writes the data set `name`, with `splits` {split: examples}, under `root`."""
  folder = root / name / '1.0.0'
  folder.mkdir(parents=True)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=name, version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name=''
  )
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
  writer = tfds.core.SequentialWriter(
    info, 1000, file_format=tfds.core.FileFormat.from_value(file_format)
  )
  writer.initialize_splits(list(splits))
  # Writing reads the images' streams to their end: each split gets its own.
  writer.add_examples({split: copy.deepcopy(items) for split, items in splits.items()})
  writer.close_all()


def examples(start, count):
  return [{'image': picture(value), 'label': value % 3} for value in range(start, start + count)]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A data_dir with a few tiny data sets."""
  root = tmp_path_factory.mktemp('tfds')
  prepare(root, 'animals', BOTH, {'train': examples(0, 12), 'test': examples(50, 5)})
  prepare(root, 'train_alone', BOTH, {'train': examples(0, 20)})
  prepare(root, 'test_alone', BOTH, {'test': examples(0, 2)})
  unlabelled = [{'image': picture(value)} for value in (3, 4)]
  prepare(root, 'unlabelled', IMAGES, {'train': unlabelled, 'validation': unlabelled})
  odd = [
    {'image': picture(90, 'JPEG', 'CMYK'), 'label': 0},
    {'image': picture(60, 'PNG', 'L'), 'label': 1},
  ]
  prepare(root, 'odd', BOTH, {'train': odd, 'test': odd})
  bad = [{'image': io.BytesIO(b'no image'), 'label': 0}]
  prepare(root, 'bad', BOTH, {'train': bad, 'test': bad})
  return root


def settings(root, name, **changes):
  values = {'image_size': 4, 'channels': 3, 'num_classes': 3, **changes}
  return config.Data(source=name, path=str(root), **values)


def colours(source):
  """(colour, label) of all examples, in order."""
  batch = source.gather(np.arange(len(source)))
  return [
    (int(value), int(label))
    for value, label in zip(batch['image'][:, 0, 0, 0], batch['label'], strict=True)
  ]


@pytest.mark.parametrize('lazy', [False, True])
def test_splits(root, monkeypatch, lazy):
  if lazy:
    monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  train, valid = (sources.load(settings(root, 'animals'), split) for split in ('train', 'valid'))
  assert isinstance(train, tfds_source.TfdsSource if lazy else base.ArraySource)
  assert colours(train) == [(value, value % 3) for value in range(12)]
  assert colours(valid) == [(value, value % 3) for value in range(50, 55)]
  assert train.class_names == ('cat', 'dog', 'eel')
  assert train[0]['image'].shape == (4, 4, 3)
  assert train[0]['label'].dtype == np.int32


def test_train_split_alone_is_divided(root):
  train, valid = (sources.load(settings(root, 'train_alone'), s) for s in ('train', 'valid'))
  assert (len(train), len(valid)) == (18, 2)
  assert sorted(colours(train) + colours(valid)) == [(value, value % 3) for value in range(20)]


def test_labels_are_optional(root):
  source = sources.load(settings(root, 'animals', num_classes=0), 'train')
  assert {label for _, label in colours(source)} == {0}
  assert source.class_names == ()
  data = settings(root, 'unlabelled', num_classes=0, valid_split='validation')
  assert colours(sources.load(data, 'valid')) == [(3, 0), (4, 0)]


def test_images_that_tfds_would_not_decode(root):
  (cmyk, _), (grey, _) = colours(sources.load(settings(root, 'odd'), 'train'))
  assert abs(cmyk - 90) < 4
  assert grey == 60


@pytest.mark.parametrize(
  'name, changes, split, reason',
  [
    ('animals', {'num_classes': 10}, 'train', r'animals has 3 classes, .*num_classes=3'),
    ('unlabelled', {}, 'train', r'unlabelled has no classes, .*num_classes=0'),
    ('animals', {'valid_split': 'dev'}, 'valid', r'valid_split=dev is not .* set it to test'),
    ('animals', {'valid_split': 'train'}, 'valid', r'valid_split=train is not .* set it to test'),
    ('test_alone', {}, 'train', r'no split called train \(it has test\)'),
    ('bad', {}, 'train', r'example 0 of bad cannot be read \(it is not a JPEG'),
    ('no_such_set', {}, 'train', r'no data set of TFDS \(Dataset no_such_set not found\)'),
    ('No Set!', {}, 'train', r'no data set of TFDS'),
    ('mnist:99.0.0', {}, 'train', r'no data set of TFDS'),
    ('mnist', {}, 'train', r"not prepared under .*mnist.*file_format='array_record', data_dir="),
  ],
)
def test_errors(root, name, changes, split, reason):
  with pytest.raises(errors.ConfigError, match=reason) as caught:
    sources.load(settings(root, name, **changes), split)
  assert '\n' not in str(caught.value)


def test_unprepared_fashion_mnist_mentions_files(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  data = config.Data(source='fashion_mnist', image_size=28)
  with pytest.raises(errors.ConfigError, match=r'not prepared .* to a folder with the four IDX'):
    sources.load(data, 'train')


def test_format_without_random_access(root, monkeypatch):
  def refuse(self, *args, **kwargs):
    raise NotImplementedError('Random access data source is not supported')

  monkeypatch.setattr(tfds.core.DatasetBuilder, 'as_data_source', refuse)
  with pytest.raises(errors.ConfigError, match=r'has no random access; delete .* python -c'):
    sources.load(settings(root, 'animals'), 'train')


@pytest.mark.parametrize(
  'features, reason',
  [
    ({'label': tfds.features.ClassLabel(num_classes=3)}, 'no image features'),
    ({'left': IMAGES['image'], 'right': IMAGES['image']}, 'left, right where one image'),
    ({'depth': tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)}, 'not of 8 or 16 bits'),
  ],
)
def test_features_without_one_image(features, reason):
  with pytest.raises(errors.ConfigError, match=reason):
    tfds_source._image_key(tfds, tfds.features.FeaturesDict(features), 'X')


def test_only_image_and_only_label_need_no_special_names(tmp_path):
  features = {'photo': BOTH['image'], 'species': BOTH['label']}
  items = [{'photo': picture(5), 'species': 2}]
  prepare(tmp_path, 'renamed', features, {'train': items, 'test': items})
  assert colours(sources.load(settings(tmp_path, 'renamed'), 'train')) == [(5, 2)]


def test_tensorflow_is_not_imported(root):
  program = f"""
import sys
from farmer_jax import config
from farmer_jax.data import pipeline, sources
data = config.Data(source='animals', path={str(root)!r}, image_size=4, num_classes=3)
assert 'tensorflow_datasets' not in sys.modules
source = sources.load(data, 'train')
assert next(pipeline.train_iterator(source, data, 2, 0))['image'].shape == (2, 4, 4, 1)
assert 'tensorflow' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', program], check=True)
