"""Digits, synthetic images, Fashion-MNIST files, and `sources.load`."""

import gzip
import pathlib
import struct

import numpy as np
import pytest
import sklearn.datasets

from farmer_jax import config, errors
from farmer_jax.data import sources

DEBIAN = pathlib.Path('/usr/share/datasets/fashion-mnist')


def load_both(data):
  return sources.load(data, 'train'), sources.load(data, 'valid')


def images_as_bytes(source):
  return {source[index]['image'].tobytes() for index in range(len(source))}


def test_digits_are_split_and_agree_with_scikit_learn():
  data = config.Data(source='digits')
  train, valid = load_both(data)
  assert (len(train), len(valid)) == (1617, 180)
  assert list(train.class_names) == list('0123456789')
  assert train.images.shape == (1617, 8, 8, 1)
  assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
  original = sklearn.datasets.load_digits()
  loaded = [
    (np.rint(image[..., 0] / 255 * 16).tobytes(), label)
    for source in (train, valid)
    for image, label in zip(source.images, source.labels, strict=True)
  ]
  expected = zip(original.images, original.target, strict=True)
  assert set(loaded) == {(image.tobytes(), label) for image, label in expected}
  assert not images_as_bytes(train) & images_as_bytes(valid)
  assert np.bincount(valid.labels).min() >= 17
  np.testing.assert_array_equal(valid.images, sources.load(data, 'valid').images)
  with pytest.raises(ValueError, match="split .*'test'"):
    sources.load(data, 'test')
  assert len(sources.load(config.Data(valid_fraction=0.5), 'valid')) == round(1797 / 2)


def test_a_path_that_is_not_read_is_reported(caplog):
  sources.load(config.Data(source='digits'), 'valid')
  assert 'data.source=folder' not in caplog.text
  sources.load(config.Data(source='digits', path='/photos'), 'valid')
  assert '/photos' in caplog.text and 'data.source=folder' in caplog.text


def test_digits_resized_in_color_without_labels():
  data = config.Data(source='digits', image_size=16, channels=3, num_classes=0)
  source = sources.load(data, 'valid')
  assert source[0]['image'].shape == (16, 16, 3)
  small = sources.load(config.Data(source='digits'), 'valid').images[..., 0].astype(float)
  means = source.images[..., 1].reshape(-1, 8, 2, 8, 2).mean((2, 4))
  assert np.corrcoef(means.ravel(), small.ravel())[0, 1] > 0.98
  assert not source.labels.any() and not source.class_names
  with pytest.raises(errors.ConfigError, match='num_classes=10'):
    sources.load(config.Data(source='digits', num_classes=9), 'train')


def test_synthetic():
  data = config.Data(
    source='synthetic', image_size=5, channels=3, num_classes=4, synthetic_examples=80
  )
  train, valid = load_both(data)
  assert (len(train), len(valid)) == (72, 8)
  assert train[0]['image'].shape == (5, 5, 3)
  assert len(images_as_bytes(train) | images_as_bytes(valid)) == 80
  assert set(train.labels) == {0, 1, 2, 3}
  np.testing.assert_array_equal(train.images, sources.load(data, 'train').images)


def write_idx(path, array):
  header = bytes((0, 0, 8, array.ndim)) + struct.pack(f'>{array.ndim}I', *array.shape)
  path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx_folder(tmp_path):
  """A folder with a tiny Fashion-MNIST: (path, training images, training labels)."""
  rng = np.random.default_rng(0)
  for prefix, count in (('t10k', 10), ('train', 30)):
    pixels = rng.integers(0, 256, (count, 28, 28), np.uint8)
    labels = rng.permutation(count).astype(np.uint8) % 10
    write_idx(tmp_path / f'{prefix}-images-idx3-ubyte.gz', pixels)
    write_idx(tmp_path / f'{prefix}-labels-idx1-ubyte.gz', labels)
  return tmp_path, pixels, labels


def settings(path, **changes):
  return config.Data(source='fashion_mnist', path=str(path), image_size=28, **changes)


def test_idx_files(idx_folder):
  path, pixels, labels = idx_folder
  train, valid = load_both(settings(path))
  np.testing.assert_array_equal(train.images[..., 0], pixels)
  np.testing.assert_array_equal(train.labels, labels)
  assert train.labels.dtype == np.int32
  assert (len(train), len(valid)) == (30, 10)
  assert train.class_names[9] == 'Ankle boot'
  assert not sources.load(settings(path, num_classes=0), 'train').labels.any()
  with pytest.raises(errors.ConfigError, match='num_classes=10'):
    sources.load(settings(path, num_classes=3), 'train')


def test_damaged_idx_file(idx_folder):
  file = idx_folder[0] / 'train-images-idx3-ubyte.gz'
  packed = file.read_bytes()
  content = gzip.decompress(packed)
  for damaged, reason in (
    (packed[: len(packed) // 2], '.'),
    (packed[:50] + b'####' + packed[54:], '.'),
    (b'not gzip', '.'),
    (b'', '3 dimensions'),
    (gzip.compress(content[:-1]), r'size 23519 into shape \(30,28,28\)'),
    (gzip.compress(content + b'0'), r'size 23521 into shape \(30,28,28\)'),
    (gzip.compress(content[:7]), '.'),
    (gzip.compress(content[:3] + b'\1' + content[4:]), '3 dimensions'),
    (gzip.compress(content[:2] + b'\x0d' + content[3:]), '3 dimensions'),
    (gzip.compress(content[:4] + b'\xff' * 12 + content[16:]), '.'),
    (gzip.compress(content[:4] + (2**21).to_bytes(4, 'big') * 3 + content[16:]), '.'),
  ):
    file.write_bytes(damaged)
    with pytest.raises(errors.DataError, match=reason) as caught:
      sources.load(settings(idx_folder[0]), 'train')
    assert str(file) in str(caught.value) and '\n' not in str(caught.value)


def test_missing_idx_files(idx_folder):
  path = idx_folder[0]
  (path / 't10k-labels-idx1-ubyte.gz').unlink()
  with pytest.raises(errors.ConfigError, match='t10k-labels-idx1'):
    sources.load(settings(path), 'valid')
  for wrong in (path / 'nowhere', path / 'train-images-idx3-ubyte.gz'):
    with pytest.raises(errors.ConfigError, match='config.data.path=.*four IDX'):
      sources.load(settings(wrong), 'train')


@pytest.mark.parametrize(
  'count, labels, match',
  [
    (30, np.zeros(29, np.uint8), '30 images but .* has 29 labels'),
    (30, np.full(30, 10, np.uint8), 'label 10'),
    (0, np.zeros(0, np.uint8), 'fashion_mnist has no images'),
  ],
)
def test_inconsistent_idx_files(tmp_path, count, labels, match):
  write_idx(tmp_path / 'train-labels-idx1-ubyte.gz', labels)
  write_idx(tmp_path / 'train-images-idx3-ubyte.gz', np.zeros((count, 28, 28), np.uint8))
  with pytest.raises(errors.DataError, match=match):
    sources.load(settings(tmp_path), 'train')


@pytest.mark.skipif(not DEBIAN.exists(), reason='needs the Debian package dataset-fashion-mnist')
def test_original_fashion_mnist():
  train, valid = load_both(settings(DEBIAN))
  assert (len(train), len(valid)) == (60_000, 10_000)
  np.testing.assert_array_equal(np.bincount(train.labels), 6000)
  np.testing.assert_array_equal(np.bincount(valid.labels), 1000)
  assert train.images.mean() == pytest.approx(72.94, abs=0.01)  # Published: 0.2860 * 255.
  assert train.class_names[train.labels[0]] == 'Ankle boot'
  assert train.class_names == sources.FASHION_MNIST_CLASSES
