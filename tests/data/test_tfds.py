"""TFDS data sets, read from ArrayRecord files that the tests write without TensorFlow."""

import io

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from farmer_jax import config, errors
from farmer_jax.data import base, sources
from farmer_jax.data import tfds as tfds_source
from tests.support import data as data_lib
from tests.support import processes

BOTH = {
  'image': tfds.features.Image(shape=(None, None, 3)),
  'label': tfds.features.ClassLabel(names=['cat', 'dog', 'eel']),
}
IMAGES = {'image': tfds.features.Image(shape=(None, None, 3))}


def picture(value, kind='PNG', mode='RGB'):
  """Returns an in-memory image file with one gray level."""
  image = PIL.Image.new('RGB', (7, 9), (value, value, value)).convert(mode)
  return io.BytesIO(data_lib.encode(image, kind))


def examples(start, count):
  return [{'image': picture(value), 'label': value % 3} for value in range(start, start + count)]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A data_dir with several tiny data sets."""
  root = tmp_path_factory.mktemp('tfds')
  unlabeled = [{'image': picture(value)} for value in (3, 4)]
  odd = [
    {'photo': picture(90, 'JPEG', 'CMYK'), 'species': 0},
    {'photo': picture(60, 'PNG', 'L'), 'species': 1},
  ]
  bad = [{'image': io.BytesIO(b'no image'), 'label': 0}]
  renamed = {'photo': BOTH['image'], 'species': BOTH['label']}
  for name, features, splits in (
    ('animals', BOTH, {'train': examples(0, 12), 'test': examples(50, 5)}),
    ('train_alone', BOTH, {'train': examples(0, 20)}),
    ('test_alone', BOTH, {'test': examples(0, 2)}),
    ('unlabeled', IMAGES, {'train': unlabeled, 'validation': unlabeled}),
    ('odd', renamed, {'train': odd, 'test': odd}),
    ('bad', BOTH, {'train': bad, 'test': bad}),
  ):
    data_lib.write_tfds(root, name, features, splits)
  return root


def settings(root, name, **changes):
  values = {'image_size': 4, 'channels': 3, 'num_classes': 3, **changes}
  return config.Data(source=name, path=str(root), **values)


def levels(source):
  """Returns (gray level, label) of all examples, in order."""
  batch = source.gather(np.arange(len(source)))
  return list(zip(batch['image'][:, 0, 0, 0].tolist(), batch['label'].tolist(), strict=True))


@pytest.mark.parametrize('lazy', [False, True])
def test_splits(root, monkeypatch, lazy):
  if lazy:
    monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  train, valid = (sources.load(settings(root, 'animals'), split) for split in ('train', 'valid'))
  assert isinstance(train, tfds_source.TfdsSource if lazy else base.ArraySource)
  assert levels(train) == [(value, value % 3) for value in range(12)]
  assert levels(valid) == [(value, value % 3) for value in range(50, 55)]
  assert train.class_names == ('cat', 'dog', 'eel')
  assert train[0]['image'].shape == (4, 4, 3)
  assert train[0]['label'].dtype == np.int32


def test_train_split_without_other_splits_is_divided(root):
  train, valid = (sources.load(settings(root, 'train_alone'), s) for s in ('train', 'valid'))
  assert (len(train), len(valid)) == (18, 2)
  assert sorted(levels(train) + levels(valid)) == [(value, value % 3) for value in range(20)]


def test_labels_are_optional(root):
  source = sources.load(settings(root, 'animals', num_classes=0), 'train')
  assert {label for _, label in levels(source)} == {0}
  assert source.class_names == ()
  data = settings(root, 'unlabeled', num_classes=0, valid_split='validation')
  assert levels(sources.load(data, 'valid')) == [(3, 0), (4, 0)]


def test_cmyk_and_gray_images_in_features_of_other_names(root):
  (cmyk, first), (gray, second) = levels(sources.load(settings(root, 'odd'), 'train'))
  assert abs(cmyk - 90) < 4
  assert (gray, first, second) == (60, 0, 1)


@pytest.mark.parametrize(
  'name, changes, split, kind, match',
  [
    ('animals', {'num_classes': 10}, 'train', errors.ConfigError, r'animals .*num_classes=3'),
    ('unlabeled', {}, 'train', errors.ConfigError, r'unlabeled .*num_classes=0'),
    ('animals', {'valid_split': 'dev'}, 'valid', errors.ConfigError, r'valid_split=dev .* test'),
    ('animals', {'valid_split': 'train'}, 'valid', errors.ConfigError, r'valid_split=train .*test'),
    ('test_alone', {}, 'train', errors.ConfigError, r'test_alone .*\(it has test\)'),
    ('bad', {}, 'train', base.BadExampleError, r'example 0 of bad .*not a JPEG'),
    ('no_such_set', {}, 'train', errors.ConfigError, r'data\.source=no_such_set'),
    ('No Set!', {}, 'train', errors.ConfigError, r'data\.source=No Set!'),
    ('mnist:99.0.0', {}, 'train', errors.ConfigError, r'data\.source=mnist:99.0.0'),
    ('mnist', {}, 'train', errors.ConfigError, r"mnist.*file_format='array_record', data_dir="),
  ],
)
def test_wrong_settings_and_data(root, name, changes, split, kind, match):
  with pytest.raises(kind, match=match) as caught:
    sources.load(settings(root, name, **changes), split)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('label', [3, -1])
def test_label_outside_of_the_classes(label):
  records = [{'image': picture(3).read(), 'label': label}]
  data = settings('', 'animals')
  source = tfds_source.TfdsSource(data, records, np.arange(1), 'image', 'label', ())
  with pytest.raises(errors.DataError, match=f'example 0 of animals .*label {label}'):
    source[0]


def test_unprepared_fashion_mnist(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  data = config.Data(source='fashion_mnist', image_size=28)
  with pytest.raises(errors.ConfigError, match=r'config\.data\.path to a folder with the four IDX'):
    sources.load(data, 'train')


def test_format_without_random_access(root, monkeypatch):
  def refuse(self, *args, **kwargs):
    raise NotImplementedError('Random access data source is not supported')

  monkeypatch.setattr(tfds.core.DatasetBuilder, 'as_data_source', refuse)
  expected = r'animals .*no random access.* tfds convert_format --dataset_version_dir=/'
  with pytest.raises(errors.DataError, match=expected):
    sources.load(settings(root, 'animals'), 'train')


@pytest.mark.parametrize(
  'features, reason',
  [
    ({'label': tfds.features.ClassLabel(num_classes=3)}, 'no image features'),
    ({'left': IMAGES['image'], 'right': IMAGES['image']}, 'left, right'),
    ({'depth': tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)}, 'not of 8 or 16 bits'),
  ],
)
def test_features_without_one_image(features, reason):
  with pytest.raises(errors.ConfigError, match=reason):
    tfds_source._image_key(tfds, tfds.features.FeaturesDict(features), 'X')


def test_tensorflow_is_not_imported(root):
  processes.run_program('tfds_batch', root, 'animals')
