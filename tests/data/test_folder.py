"""A user's folder of images."""

import os

import numpy as np
import PIL.Image
import pytest
from absl import logging

from farmer_jax import config, errors
from farmer_jax.data import base, folder, images, sources


def write(path, value, size=(9, 7)):
  """Writes an image of one colour, `value`, making its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.new('RGB', size, (value, value, value)).save(path)


def make(root, classes, count=10):
  """Writes `count` images a class, each of its own colour."""
  for number, name in enumerate(classes):
    for index in range(count):
      write(root / name / f'{index}.png', number * count + index)
  return root


def settings(path, **changes):
  values = {'source': 'folder', 'path': str(path), 'image_size': 4, 'num_classes': 2, **changes}
  return config.Data(**values)


def colours(source):
  """{colour: label} of all examples."""
  examples = [source[index] for index in range(len(source))]
  found = {int(example['image'].flat[0]): int(example['label']) for example in examples}
  assert len(found) == len(source)
  return found


@pytest.fixture(params=['in memory', 'lazy'])
def memory(request, monkeypatch):
  """Runs a test with decoding ahead, and with decoding when read."""
  if request.param == 'lazy':
    monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  return request.param


@pytest.fixture
def warnings(monkeypatch):
  """The warnings that are logged."""
  logged = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: logged.append(text % values))
  return logged


def test_classes_are_sorted_subfolders(tmp_path, memory):
  make(tmp_path, ['zebra', 'ant'])
  write(tmp_path / 'ant' / 'deeper' / 'still' / 'x.JPEG', 99)
  train, valid = (sources.load(settings(tmp_path), split) for split in ('train', 'valid'))
  assert isinstance(train, folder.FolderSource if memory == 'lazy' else base.ArraySource)
  assert train.class_names == valid.class_names == ('ant', 'zebra')
  found = {**colours(train), **colours(valid)}
  assert found == {**dict.fromkeys(range(10), 1), **dict.fromkeys(range(10, 20), 0), 99: 0}
  assert len(valid) == 2
  assert train[0]['image'].shape == (4, 4, 1)
  assert train.labels.dtype == np.int32


def test_split_does_not_depend_on_the_disk(tmp_path, monkeypatch):
  make(tmp_path, ['a', 'b'])
  before = colours(sources.load(settings(tmp_path), 'valid'))
  scan = folder._scan
  monkeypatch.setattr(folder, '_scan', lambda path: scan(path)[::-1])
  assert colours(sources.load(settings(tmp_path), 'valid')) == before
  assert not before.keys() & colours(sources.load(settings(tmp_path), 'train')).keys()
  assert sorted(before.values()) == [0, 1]


def test_loose_images(tmp_path):
  for index in range(20):
    write(tmp_path / f'{index}.bmp', index)
  source = sources.load(settings(tmp_path, num_classes=0), 'train')
  assert set(colours(source).values()) == {0}
  assert len(source) == 18
  assert not source.class_names
  with pytest.raises(errors.ConfigError, match=r'no classes, not 10; set .*num_classes=0'):
    sources.load(settings(tmp_path, num_classes=10), 'train')


def test_subfolders_without_labels(tmp_path):
  make(tmp_path, ['a', 'b'])
  write(tmp_path / 'loose.png', 77)
  data = settings(tmp_path, num_classes=0)
  found = {**colours(sources.load(data, 'train')), **colours(sources.load(data, 'valid'))}
  assert found == {**dict.fromkeys(range(20), 0), 77: 0}
  with pytest.raises(errors.ConfigError, match=r'such as loose\.png'):
    sources.load(settings(tmp_path), 'train')


@pytest.mark.parametrize('name', ['valid', 'validation', 'val', 'test'])
def test_split_by_hand(tmp_path, name):
  make(tmp_path / 'train', ['a', 'b'], 3)
  write(tmp_path / name / 'b' / 'only.png', 200)
  write(tmp_path / '.hidden' / 'x.png', 201)
  train, valid = (sources.load(settings(tmp_path), split) for split in ('train', 'valid'))
  assert set(colours(train)) == set(range(6))
  assert colours(valid) == {200: 1}
  assert valid.class_names == ('a', 'b')
  write(tmp_path / name / 'c' / 'odd.png', 202)
  with pytest.raises(errors.ConfigError, match=r'c/odd\.png is in none of the classes'):
    sources.load(settings(tmp_path), 'valid')


def test_validation_by_hand_is_mixed(tmp_path):
  """The first few validation images, which is what a limit takes, are of all classes."""
  make(tmp_path / 'train', ['a', 'b'], 1)
  make(tmp_path / 'valid', ['a', 'b'], 20)
  assert set(sources.load(settings(tmp_path), 'valid').labels[:6]) == {0, 1}


def test_train_folder_alone(tmp_path):
  make(tmp_path / 'train', ['a', 'b'])
  assert len(sources.load(settings(tmp_path), 'train')) == 18
  assert len(sources.load(settings(tmp_path), 'valid')) == 2


def test_classes_called_like_splits(tmp_path):
  make(tmp_path, ['train', 'test', 'bus'])
  source = sources.load(settings(tmp_path, num_classes=3), 'train')
  assert source.class_names == ('bus', 'test', 'train')


def test_other_files_are_ignored(tmp_path, warnings):
  make(tmp_path, ['a', 'b'])
  for name in ('README.txt', 'a/labels.csv', 'a/.hidden.png', '.git/x.png'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('no image')
  (tmp_path / 'captions').mkdir()
  (tmp_path / 'captions' / '1.json').write_text('{}')
  assert len(sources.load(settings(tmp_path), 'train')) == 18
  (message,) = warnings
  assert 'ignored 3 files' in message
  assert 'README.txt' in message


def test_linked_class(tmp_path):
  make(tmp_path / 'elsewhere', ['x'])
  make(tmp_path / 'here', ['a'])
  (tmp_path / 'here' / 'b').symlink_to(tmp_path / 'elsewhere' / 'x')
  (tmp_path / 'here' / 'a' / 'circle').symlink_to(tmp_path / 'here' / 'a')
  source = sources.load(settings(tmp_path / 'here'), 'train')
  np.testing.assert_array_equal(np.bincount(source.labels), [9, 9])


def spoil(root):
  """Three files that are called images: text, nothing, and a picture cut short. Their paths."""
  (root / 'a' / 'text.jpg').write_text('no image')
  (root / 'b' / 'empty.png').write_bytes(b'')
  whole = root / 'b' / 'cut.png'
  noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
  PIL.Image.fromarray(noise).save(whole)
  whole.write_bytes(whole.read_bytes()[:3000])
  return [root / 'a' / 'text.jpg', root / 'b' / 'empty.png', whole]


@pytest.mark.parametrize('position', range(3))
def test_bad_file_stops(tmp_path, position):
  make(tmp_path, ['a', 'b'])
  bad = spoil(tmp_path)
  for path in bad:
    if path != bad[position]:
      path.unlink()
  with pytest.raises(errors.ConfigError) as caught:
    for split in ('train', 'valid'):
      sources.load(settings(tmp_path), split)
  message = str(caught.value)
  assert message.startswith(f'{bad[position]} is no image')
  assert '--config.data.bad_files=skip' in message
  assert '\n' not in message


def test_bad_files_are_skipped(tmp_path, warnings):
  make(tmp_path, ['a', 'b'])
  spoil(tmp_path)
  data = settings(tmp_path, bad_files='skip')
  found = {}
  for split in ('train', 'valid'):
    found |= colours(sources.load(data, split))
  assert found == {**dict.fromkeys(range(10), 0), **dict.fromkeys(range(10, 20), 1)}
  assert sum(int(message.split()[1]) for message in warnings) == 3
  for name in ('text.jpg', 'empty.png', 'cut.png'):
    assert name in ' '.join(warnings)


def test_skipping_does_not_move_images_between_splits(tmp_path):
  make(tmp_path, ['a', 'b'])
  data = settings(tmp_path, bad_files='skip', valid_fraction=0.3)
  before = set(colours(sources.load(data, 'valid')))
  (tmp_path / 'a' / '0.png').write_text('no image')
  after = set(colours(sources.load(data, 'valid')))
  assert after == before - {0}


def test_large_folder_is_checked_by_header(tmp_path, monkeypatch, warnings):
  monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  make(tmp_path, ['a', 'b'])
  cut = spoil(tmp_path)[2]
  data = settings(tmp_path, bad_files='skip', valid_fraction=0.05)
  source = sources.load(data, 'train')
  assert '2 of' in warnings[0]
  index = source.paths.index(cut)
  with pytest.raises(errors.ConfigError, match=r'cut\.png cannot be read \(image file is'):
    source[index]
  with pytest.raises(errors.ConfigError, match='is no image that can be read'):
    sources.load(settings(tmp_path, valid_fraction=0.05), 'train')


def test_nothing_but_bad_files(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    for index in range(3):
      (tmp_path / name / f'{index}.png').write_text('no image')
  with pytest.raises(errors.ConfigError, match=r'none of \d files can be read'):
    sources.load(settings(tmp_path, bad_files='skip'), 'train')


def test_links_to_nowhere_are_bad_files(tmp_path):
  make(tmp_path, ['a', 'b'])
  (tmp_path / 'a' / 'gone.png').symlink_to(tmp_path / 'nowhere')
  with pytest.raises(errors.ConfigError, match=r'gone\.png is no image .*No such file'):
    for split in ('train', 'valid'):
      sources.load(settings(tmp_path), split)


def test_failing_disk_is_not_skipped(tmp_path, monkeypatch):
  make(tmp_path, ['a', 'b'])

  def fail(encoded, size, channels):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(images, 'decode', fail)
  with pytest.raises(errors.ConfigError, match=r'\.png cannot be read: Input/output error'):
    sources.load(settings(tmp_path, bad_files='skip'), 'train')


@pytest.mark.parametrize('num_classes', [1, 3, 10])
def test_wrong_number_of_classes(tmp_path, num_classes):
  make(tmp_path, ['a', 'b'], 1)
  with pytest.raises(errors.ConfigError, match=r'has 2 classes.* --config\.data\.num_classes=2'):
    sources.load(settings(tmp_path, num_classes=num_classes), 'train')


def test_paths_that_cannot_work(tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'notes').mkdir()
  (tmp_path / 'notes' / 'x.txt').write_text('x')
  (tmp_path / 'file.png').write_text('x')
  for path, reason in [
    (tmp_path / 'nowhere', 'does not exist'),
    (tmp_path / 'file.png', 'is a file'),
    (tmp_path / 'empty', 'has no images'),
    (tmp_path / 'notes', 'only 1 other'),
    ('', 'needs --config.data.path'),
  ]:
    with pytest.raises(errors.ConfigError, match=reason) as caught:
      sources.load(settings(path), 'train')
    assert '\n' not in str(caught.value)


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
  make(tmp_path, ['a', 'b'])
  scandir = os.scandir

  def refuse(path):
    if str(path).rstrip('/').endswith('b'):
      raise PermissionError(13, 'Permission denied')
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(errors.ConfigError, match=r'b cannot be listed \(Permission denied\)'):
    sources.load(settings(tmp_path), 'train')


def test_too_few_to_split(tmp_path):
  make(tmp_path, ['a', 'b'], 1)
  with pytest.raises(errors.ConfigError, match=r'valid_fraction=0\.1 of 2 images leaves none'):
    sources.load(settings(tmp_path), 'valid')


def test_centre_crop(tmp_path):
  """A tall picture's crop is its middle: dark above and below, bright in the centre."""
  pixels = np.zeros((60, 20, 3), np.uint8)
  pixels[20:40] = 255
  for name in ('0.png', '1.png'):
    PIL.Image.fromarray(pixels).save(tmp_path / name)
  data = settings(tmp_path, num_classes=0, image_size=10, channels=3, valid_fraction=0.5)
  for split in ('train', 'valid'):
    assert (sources.load(data, split)[0]['image'] > 240).all()
