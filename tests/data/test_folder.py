"""Loading a folder of images."""

import os

import numpy as np
import pytest

from farmer_jax import config, errors
from farmer_jax.data import base, folder, folder_layout, images, sources
from tests.support import data as data_lib
from tests.support.data import write_classes, write_image


def load(path, split='train', **changes):
  settings = {'path': str(path), 'image_size': 4, 'num_classes': 2, **changes}
  return sources.load(config.Data(source='folder', **settings), split)


def load_both(path, **changes):
  return [load(path, split, **changes) for split in ('train', 'valid')]


def labels_by_level(*loaded):
  """Returns {gray level: label} of all examples. Gray levels are distinct."""
  examples = [source[index] for source in loaded for index in range(len(source))]
  found = {int(example['image'].flat[0]): int(example['label']) for example in examples}
  assert len(found) == len(examples)
  return found


def write_texts(root, *names):
  for name in names:
    (root / name).parent.mkdir(exist_ok=True, parents=True)
    (root / name).write_text('no image')


TWO_CLASSES = {level: level // 10 for level in range(20)}


@pytest.fixture
def root(tmp_path):
  """Two classes with 10 images each: a has gray levels 0 to 9, and b has 10 to 19."""
  write_classes(tmp_path, ['a', 'b'])
  return tmp_path


@pytest.mark.parametrize('lazy', [False, True])
def test_classes_are_sorted_subfolders(tmp_path, monkeypatch, lazy):
  if lazy:
    monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  write_classes(tmp_path, ['zebra', 'ant'])
  write_image(tmp_path / 'ant' / 'deeper' / 'still' / 'x.JPEG', 99)
  train, valid = load_both(tmp_path)
  assert isinstance(train, folder.FolderSource if lazy else base.ArraySource)
  assert train.class_names == valid.class_names == ('ant', 'zebra')
  expected = {level: 1 - label for level, label in TWO_CLASSES.items()} | {99: 0}
  assert labels_by_level(train, valid) == expected
  assert len(valid) == 2
  assert train[0]['image'].shape == (4, 4, 1)
  assert train.labels.dtype == np.int32


def test_split_does_not_depend_on_the_disk(root, monkeypatch):
  before = labels_by_level(load(root, 'valid'))
  list_folder = folder_layout.list_folder
  monkeypatch.setattr(folder_layout, 'list_folder', lambda *args: list_folder(*args)[::-1])
  train, valid = load_both(root)
  assert labels_by_level(valid) == before
  assert not before.keys() & labels_by_level(train).keys()
  assert sorted(before.values()) == [0, 1]


def test_images_without_class_folders(tmp_path):
  for index in range(20):
    write_image(tmp_path / f'{index}.bmp', index)
  source = load(tmp_path, num_classes=0)
  assert list(labels_by_level(source).values()) == 18 * [0]
  assert not source.class_names
  with pytest.raises(errors.ConfigError, match='num_classes=0'):
    load(tmp_path, num_classes=10)


def test_subfolders_without_labels(root):
  with pytest.raises(errors.ConfigError, match=r'config\.data\.num_classes=2'):
    load(root, num_classes=3)
  write_image(root / 'loose.png', 77)
  found = labels_by_level(*load_both(root, num_classes=0))
  assert found == {**dict.fromkeys(range(20), 0), 77: 0}
  with pytest.raises(errors.DataError, match=r'loose\.png'):
    load(root)


@pytest.mark.parametrize('name', ['valid', 'validation', 'val', 'test'])
def test_validation_folder(tmp_path, name):
  write_classes(tmp_path / 'train', ['a', 'b'], 3)
  write_image(tmp_path / name / 'b' / 'only.png', 200)
  write_image(tmp_path / '.hidden' / 'x.png', 201)
  train, valid = load_both(tmp_path)
  assert set(labels_by_level(train)) == set(range(6))
  assert labels_by_level(valid) == {200: 1}
  assert valid.class_names == ('a', 'b')
  write_image(tmp_path / name / 'c' / 'odd.png', 202)
  with pytest.raises(errors.DataError, match=r'c/odd\.png'):
    load(tmp_path, 'valid')


def test_train_folder_without_and_with_validation_folder(tmp_path):
  write_classes(tmp_path / 'train', ['a', 'b'])
  assert [len(source) for source in load_both(tmp_path)] == [18, 2]
  write_classes(tmp_path / 'valid', ['a', 'b'], 20)
  assert set(load(tmp_path, 'valid').labels[:6]) == {0, 1}  # The first images contain all classes.


def test_classes_named_like_splits(tmp_path):
  write_classes(tmp_path, ['train', 'test', 'bus'])
  assert load(tmp_path, num_classes=3).class_names == ('bus', 'test', 'train')


def test_other_files_are_ignored(root):
  write_texts(root, 'README.txt', 'a/labels.csv', 'a/.hidden.png', '.git/x.png', 'captions/1.json')
  source = load(root)
  assert len(source) == 18
  (message,) = source.origin.ignored
  assert '3 files' in message and 'README.txt' in message


def test_class_folder_can_be_a_link(root):
  (root / 'here').mkdir()
  for name in ('a', 'b'):
    (root / 'here' / name).symlink_to(root / name)
  (root / 'a' / 'cycle').symlink_to(root / 'a')
  np.testing.assert_array_equal(np.bincount(load(root / 'here').labels), [9, 9])


def write_bad_files(root):
  """Writes three files that are not readable images."""
  text, empty, cut = root / 'a' / 'text.jpg', root / 'b' / 'empty.png', root / 'b' / 'cut.png'
  text.write_text('no image')
  empty.write_bytes(b'')
  noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
  cut.write_bytes(data_lib.encode(noise, 'PNG')[:3000])
  return [text, empty, cut]


def test_bad_file_raises_an_error(root):
  bad = write_bad_files(root)
  bad += [root / 'a' / 'broken_link.png', root / 'a' / 'pipe.png']
  bad[3].symlink_to(root / 'nowhere')
  os.mkfifo(bad[4])  # Opening it would block.
  while bad:
    with pytest.raises(errors.DataError, match=r'data\.bad_files=skip') as caught:
      load_both(root)
    assert '\n' not in str(caught.value)
    (found,) = [path for path in bad if str(caught.value).startswith(str(path))]
    found.unlink()
    bad.remove(found)
  load_both(root)


def test_bad_files_are_skipped_and_do_not_move_images_between_splits(root, caplog):
  settings = {'bad_files': 'skip', 'valid_fraction': 0.3}
  names = [path.name for path in write_bad_files(root)]
  train, valid = map(labels_by_level, load_both(root, **settings))
  assert train | valid == TWO_CLASSES
  skipped = [message for message in caplog.messages if message.startswith('skipped')]
  assert sum(int(message.split()[1]) for message in skipped) == 3
  assert all(name in ' '.join(skipped) for name in names)
  (root / 'a' / '0.png').write_text('no image')
  assert labels_by_level(load(root, 'valid', **settings)).keys() == valid.keys() - {0}


def test_large_folder_is_checked_by_header(root, monkeypatch, caplog):
  monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  cut = write_bad_files(root)[2]
  source = load(root, bad_files='skip', valid_fraction=0.05)
  assert '2 of' in caplog.messages[0]
  with pytest.raises(base.BadExampleError, match=r'cut\.png'):
    source[source.paths.index(cut)]
  with pytest.raises(errors.DataError, match='bad_files'):
    load(root, valid_fraction=0.05)


@pytest.mark.parametrize(
  'error, match',
  [
    (images.BadImageError('it is no image'), r'none of \d+ files .*it is no image'),
    (OSError(5, 'Input/output error'), r'\.png .*Input/output error'),  # The disk fails.
  ],
)
def test_files_that_are_not_skipped(root, monkeypatch, error, match):
  def fail(*args):
    raise error

  monkeypatch.setattr(images, 'decode', fail)
  with pytest.raises(errors.DataError, match=match):
    load(root, bad_files='skip')


@pytest.mark.parametrize(
  'path, split, kind, match',
  [
    ('nowhere', 'train', errors.ConfigError, 'data.path=.*nowhere does not exist'),
    ('file.png', 'train', errors.ConfigError, 'data.path=.*file.png is a file'),
    ('empty', 'train', errors.DataError, 'empty has no images'),
    ('notes', 'train', errors.DataError, 'notes has no images.* 1 other'),
    (None, 'train', errors.ConfigError, 'config.data.path'),
    ('few', 'valid', errors.ConfigError, r'valid_fraction=0\.1 of 2 images'),
  ],
)
def test_path_without_images(tmp_path, path, split, kind, match):
  write_texts(tmp_path, 'notes/x.txt', 'file.png')
  write_classes(tmp_path / 'few', ['a', 'b'], 1)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(kind, match=match) as caught:
    load(tmp_path / path if path else '', split)
  assert '\n' not in str(caught.value)
