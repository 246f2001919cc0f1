"""Digits, synthetic images, Fashion-MNIST files, and the choice among sources."""

import gzip
import pathlib
import struct

import numpy as np
import pytest
import sklearn.datasets

from farmer_jax import config, errors
from farmer_jax.data import fashion_mnist, sources

DEBIAN = pathlib.Path('/usr/share/datasets/fashion-mnist')


def by_bytes(source):
  return {source[index]['image'].tobytes() for index in range(len(source))}


def test_digits_are_the_originals():
  data = config.Data(source='digits')
  train, valid = sources.load(data, 'train'), sources.load(data, 'valid')
  assert (len(train), len(valid)) == (1617, 180)
  assert list(train.class_names) == list('0123456789')
  assert train.images.shape == (1617, 8, 8, 1)
  assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
  original = sklearn.datasets.load_digits()
  expected = {
    (image.tobytes(), label)
    for image, label in zip(original.images.astype(int), original.target, strict=True)
  }
  found = set()
  for source in (train, valid):
    sixteenths = np.rint(source.images[..., 0] / 255 * 16).astype(int)
    found |= {
      (image.tobytes(), label) for image, label in zip(sixteenths, source.labels, strict=True)
    }
  assert found == expected
  assert train.images.max() == 255


def test_digits_split():
  data = config.Data(source='digits')
  train, valid = sources.load(data, 'train'), sources.load(data, 'valid')
  assert not by_bytes(train) & by_bytes(valid)
  assert np.bincount(valid.labels).min() >= 17
  np.testing.assert_array_equal(valid.images, sources.load(data, 'valid').images)
  assert len(sources.load(config.Data(valid_fraction=0.5), 'valid')) == round(1797 / 2)


def test_digits_resized_in_colour():
  source = sources.load(config.Data(source='digits', image_size=16, channels=3), 'valid')
  assert source[0]['image'].shape == (16, 16, 3)
  small = sources.load(config.Data(source='digits'), 'valid').images[..., 0].astype(float)
  means = source.images[..., 1].reshape(-1, 8, 2, 8, 2).mean((2, 4))
  assert np.corrcoef(means.ravel(), small.ravel())[0, 1] > 0.98


def test_digits_without_labels():
  source = sources.load(config.Data(source='digits', num_classes=0), 'train')
  assert not source.labels.any()
  assert not source.class_names


def test_synthetic():
  data = config.Data(
    source='synthetic', image_size=5, channels=3, num_classes=4, synthetic_examples=80
  )
  train, valid = sources.load(data, 'train'), sources.load(data, 'valid')
  assert (len(train), len(valid)) == (72, 8)
  assert train[0]['image'].shape == (5, 5, 3)
  assert len(by_bytes(train) | by_bytes(valid)) == 80
  assert set(train.labels) == {0, 1, 2, 3}
  np.testing.assert_array_equal(train.images, sources.load(data, 'train').images)


def test_digits_with_wrong_number_of_classes():
  with pytest.raises(errors.ConfigError, match='digits has 10 classes, not 9'):
    sources.load(config.Data(source='digits', num_classes=9), 'train')


def test_unknown_split():
  with pytest.raises(ValueError, match='split must be one of'):
    sources.load(config.Data(), 'test')


def write_idx(path, array):
  header = bytes((0, 0, 8, array.ndim)) + struct.pack(f'>{array.ndim}I', *array.shape)
  path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def garments(tmp_path):
  """A folder with a tiny Fashion-MNIST: its path, and the training images and labels in it."""
  rng = np.random.default_rng(0)
  for prefix, count in (('t10k', 10), ('train', 30)):
    pixels = rng.integers(0, 256, (count, 28, 28), np.uint8)
    labels = rng.permutation(count).astype(np.uint8) % 10
    write_idx(tmp_path / f'{prefix}-images-idx3-ubyte.gz', pixels)
    write_idx(tmp_path / f'{prefix}-labels-idx1-ubyte.gz', labels)
  return tmp_path, pixels, labels


def fashion(path, **changes):
  return config.Data(source='fashion_mnist', path=str(path), image_size=28, **changes)


def test_idx_files(garments):
  path, pixels, labels = garments
  train, valid = (sources.load(fashion(path), split) for split in ('train', 'valid'))
  np.testing.assert_array_equal(train.images[..., 0], pixels)
  np.testing.assert_array_equal(train.labels, labels)
  assert train.labels.dtype == np.int32
  assert (len(train), len(valid)) == (30, 10)
  assert train.class_names[9] == 'Ankle boot'
  small = sources.load(fashion(path, num_classes=0), 'train')
  assert not small.labels.any()


def test_idx_with_wrong_number_of_classes(garments):
  with pytest.raises(errors.ConfigError, match='num_classes=10'):
    sources.load(fashion(garments[0], num_classes=3), 'train')


def recompressed(change):
  """A way to damage a file: `change` applied to its uncompressed bytes."""
  return lambda content: gzip.compress(change(gzip.decompress(content)))


@pytest.mark.parametrize(
  'damage, reason',
  [
    (lambda content: content[: len(content) // 2], 'cannot be read'),
    (lambda content: content[:50] + b'####' + content[54:], 'cannot be read'),
    (lambda content: b'not gzip', 'cannot be read'),
    (lambda content: b'', 'not an IDX file'),
    (recompressed(lambda content: content[:-1]), '23520 bytes, and 23519 follow'),
    (recompressed(lambda content: content + b'0'), '23520 bytes, and 23521 follow'),
    (recompressed(lambda content: content[:7]), 'not an IDX file'),
    (recompressed(lambda content: content[:3] + b'\1' + content[4:]), 'not an IDX file'),
    (recompressed(lambda content: content[:2] + b'\x0d' + content[3:]), 'not an IDX file'),
    (recompressed(lambda content: content[:4] + b'\xff' * 12 + content[16:]), 'damaged'),
  ],
)
def test_damaged_idx_file(garments, damage, reason):
  file = garments[0] / 'train-images-idx3-ubyte.gz'
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(errors.ConfigError, match=reason) as caught:
    sources.load(fashion(garments[0]), 'train')
  assert str(file) in str(caught.value)
  assert '\n' not in str(caught.value)


def test_missing_idx_files(garments):
  path = garments[0]
  (path / 't10k-labels-idx1-ubyte.gz').unlink()
  with pytest.raises(errors.ConfigError, match='there is no t10k-labels-idx1'):
    sources.load(fashion(path), 'valid')
  for wrong in (path / 'nowhere', path / 'train-images-idx3-ubyte.gz'):
    with pytest.raises(errors.ConfigError, match='set it to a folder with the four IDX'):
      sources.load(fashion(wrong), 'train')


def test_idx_files_that_disagree(garments):
  file = garments[0] / 'train-labels-idx1-ubyte.gz'
  write_idx(file, np.zeros(29, np.uint8))
  with pytest.raises(errors.ConfigError, match=r'30 images but .* has 29 labels'):
    sources.load(fashion(garments[0]), 'train')
  write_idx(file, np.full(30, 10, np.uint8))
  with pytest.raises(errors.ConfigError, match='label 10, above 9'):
    sources.load(fashion(garments[0]), 'train')


def test_empty_idx_files(garments):
  write_idx(garments[0] / 'train-images-idx3-ubyte.gz', np.zeros((0, 28, 28), np.uint8))
  write_idx(garments[0] / 'train-labels-idx1-ubyte.gz', np.zeros(0, np.uint8))
  with pytest.raises(errors.ConfigError, match='no images in its train split'):
    sources.load(fashion(garments[0]), 'train')


@pytest.mark.skipif(not DEBIAN.exists(), reason='needs the Debian package dataset-fashion-mnist')
def test_the_real_fashion_mnist():
  train, valid = (sources.load(fashion(DEBIAN), split) for split in ('train', 'valid'))
  assert (len(train), len(valid)) == (60_000, 10_000)
  np.testing.assert_array_equal(np.bincount(train.labels), 6000)
  np.testing.assert_array_equal(np.bincount(valid.labels), 1000)
  assert train.images.mean() == pytest.approx(72.94, abs=0.01)  # The known 0.2860 of 255.
  assert train.class_names[train.labels[0]] == 'Ankle boot'
  assert train.class_names == fashion_mnist.CLASS_NAMES
