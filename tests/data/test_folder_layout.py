"""Splits and classes of image folders, as people and tools lay them out."""

import json
import os

import numpy as np
import pytest

from farmer_jax import config, errors
from farmer_jax.data import base, sources
from tests.support.data import write_image

SPLITS = {'train/a': 10, 'train/b': 10, 'val/a': 3, 'val/b': 3}


def write(root, counts):
  """Writes `counts` {folder: number of images}. All images are different."""
  level = 0
  for folder, count in counts.items():
    (root / folder).mkdir(parents=True)
    for _ in range(count):
      write_image(root / folder / f'{level}.png', level)
      level += 1


def load(root, num_classes=2, class_names=(), **changes):
  """Returns the training and the validation split."""
  data = config.Data('folder', str(root), 4, num_classes=num_classes, **changes)
  return [sources.load(data, split, class_names) for split in ('train', 'valid')]


def sizes(root, *args, **changes):
  return [len(source) for source in load(root, *args, **changes)]


@pytest.mark.parametrize('num_classes', [0, 2])
@pytest.mark.parametrize(
  'name, count',
  [
    ('__MACOSX/train', 4),
    ('@eaDir/a', 4),
    ('train/@eaDir/a', 4),
    ('val/b/@eaDir', 4),
    ('#recycle', 4),
    ('$RECYCLE.BIN', 4),
    ('lost+found', 0),
    ('annotations', 0),
    ('.git/train', 4),
  ],
)
def test_folders_that_are_not_data(tmp_path, num_classes, name, count):
  write(tmp_path, SPLITS | {name: count})
  (tmp_path / 'annotations').mkdir(exist_ok=True)
  (tmp_path / 'annotations' / 'labels.json').write_text('{}')
  assert sizes(tmp_path, num_classes) == [20, 6]


@pytest.mark.parametrize(
  'train, valid',
  [
    ('Train', 'Val'),
    ('TRAIN', 'VALIDATION'),
    ('training', 'testing'),
    ('train', 'dev'),
    ('train', 'eval'),
    ('train_set', 'test_set'),
    ('TrainingSet', 'ValidationSet'),
    ('traindata', 'testdata'),
    ('train2017', 'val2017'),
    ('images_train', 'images_val'),
    ('train-images', 'held-out'),
    ('Trn', 'HoldOut'),
  ],
)
def test_spellings_of_splits(tmp_path, train, valid):
  write(tmp_path, {f'{train}/a': 10, f'{train}/b': 10, f'{valid}/a': 3, f'{valid}/b': 3})
  for num_classes in (0, 2):
    assert sizes(tmp_path, num_classes) == [20, 6]


def test_a_validation_split_has_precedence_over_a_test_split(tmp_path):
  write(tmp_path, SPLITS | {'test/a': 1, 'test/b': 1})
  train, valid = load(tmp_path)
  assert (len(train), len(valid)) == (20, 6)
  assert train.origin.ignored == ('test',)


@pytest.mark.parametrize(
  'counts, num_classes',
  [
    (SPLITS | {'masks': 9}, 0),
    (SPLITS | {'validation/a': 3}, 2),
    ({'train2014/a': 9, 'train2017/a': 9, 'val/a': 3}, 0),
    ({'cat_train': 9, 'cat_test': 9, 'dog_train': 9}, 0),
    ({'train': 9, 'bus': 9}, 0),
    ({'val': 9, 'cat': 9}, 0),
    ({'val': 9, 'test': 9}, 0),
    (SPLITS | {'.': 1}, 0),
    ({'images/train': 9, 'images/val': 9}, 0),
    ({'cat/train': 9, 'cat/test': 9, 'dog/train': 9, 'dog/test': 9}, 2),
  ],
)
def test_two_readings_are_refused(tmp_path, counts, num_classes):
  for folder in (counts := dict(counts)).copy():
    if folder == '.':
      write_image(tmp_path / 'loose.png', counts.pop(folder))
  write(tmp_path, counts)
  with pytest.raises(errors.DataError, match=r'data\.layout=classes') as caught:
    load(tmp_path, num_classes)
  assert '\n' not in str(caught.value)
  everything = sum(counts.values()) + (tmp_path / 'loose.png').exists()
  assert sum(sizes(tmp_path, 0, layout='classes')) == everything


@pytest.mark.parametrize(
  'counts, num_classes, expected',
  [
    ({'train': 10, 'bus': 10, 'car': 10}, 3, ('bus', 'car', 'train')),
    ({'train': 10, 'test': 10, 'bus': 10}, 3, ('bus', 'test', 'train')),
    ({'val': 10, 'cat': 10}, 2, ('cat', 'val')),
    ({'train_station': 10, 'office': 10}, 2, ('office', 'train_station')),
    (SPLITS | {'unlabeled': 5}, 2, ('a', 'b')),
  ],
)
def test_the_number_of_classes_decides(tmp_path, counts, num_classes, expected):
  write(tmp_path, counts)
  assert load(tmp_path, num_classes)[0].class_names == expected


@pytest.mark.parametrize('names', [('seg_train', 'seg_test'), ('train_hr', 'valid_hr')])
@pytest.mark.parametrize('num_classes', [0, 2])
def test_splits_with_other_words_and_classes_are_not_two_classes(tmp_path, names, num_classes):
  train, valid = names
  write(tmp_path, {f'{name}/{label}': 4 for name in (train, valid) for label in ('cat', 'dog')})
  with pytest.raises(errors.DataError, match=f'{train}.*{valid}|{valid}.*{train}'):
    load(tmp_path, num_classes)


@pytest.mark.parametrize('is_link', [False, True])
def test_validation_split_without_its_training_split_is_refused(tmp_path, is_link):
  """Otherwise the model would be trained on the validation images."""
  write(tmp_path, {'val/a': 4, 'val/b': 4})
  if is_link:
    (tmp_path / 'train').symlink_to(tmp_path / 'not_mounted')
  else:
    (tmp_path / 'train.tar.gz').write_text('')
  for num_classes in 0, 1, 2:
    with pytest.raises(errors.DataError, match='train.* is not a folder'):
      load(tmp_path, num_classes)


def test_layout_splits_ignores_other_folders(tmp_path):
  write(tmp_path, SPLITS | {'extra': 5})
  train, valid = load(tmp_path, 0, layout='splits')
  assert (len(train), len(valid), train.origin.ignored) == (20, 6, ('extra',))
  with pytest.raises(errors.DataError, match=r'data\.layout'):
    load(tmp_path / 'train', 2, layout='splits', valid_fraction=0.5)


def test_unreadable_folder_is_skipped_with_the_bad_files(tmp_path, monkeypatch):
  write(tmp_path, {'a': 10, 'b': 10, 'b/secret': 1})
  scandir = os.scandir

  def refuse(path):
    if str(path).rstrip('/').endswith('secret'):
      raise PermissionError(13, 'Permission denied')
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(errors.DataError, match=r'secret cannot be listed \(Permission denied\)'):
    load(tmp_path)
  train, valid = load(tmp_path, bad_files='skip')
  assert len(train) + len(valid) == 20
  assert 'secret cannot be listed' in train.origin.ignored[0]


def test_order_and_names_of_classes(tmp_path):
  write(tmp_path, {'10': 9, '2': 9, 'cafe\u0301': 9})  # An accented e, as macOS stores it.
  write(tmp_path, {os.fsdecode(b'caf\xe9'): 9})  # Not UTF-8.
  train, _ = load(tmp_path, 4)
  assert train.class_names == ('10', '2', 'caf\\xe9', 'caf\u00e9')
  json.dumps(train.class_names).encode()


ANIMALS = ('cat', 'dog', 'owl')


@pytest.mark.parametrize('lazy', [False, True])
def test_labels_of_a_run_go_by_name(tmp_path, monkeypatch, lazy):
  if lazy:
    monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  write(tmp_path, {'dog': 10, 'owl': 20})
  train, _ = load(tmp_path, 3, ANIMALS)
  assert train.class_names == ANIMALS
  np.testing.assert_array_equal(np.bincount(train.labels), [0, 9, 18])
  assert {int(e['label']) for e in map(train.__getitem__, range(27))} == {1, 2}


def test_unknown_class_is_refused_or_left_out(tmp_path):
  write(tmp_path, {'dog': 10, 'owl': 10, 'zebra': 10})
  with pytest.raises(errors.DataError, match=r'zebra.*unknown_classes=leave_out'):
    load(tmp_path, 3, ANIMALS)
  train, valid = load(tmp_path, 3, ANIMALS, unknown_classes='leave_out')
  assert set(train.labels) == {1, 2} and len(train) + len(valid) == 20
  with pytest.raises(errors.DataError, match='zebra'):
    load(tmp_path, 3, ('ant', 'bee', 'cow'), unknown_classes='leave_out')


@pytest.mark.parametrize('lazy', [False, True])
def test_classes_of_other_sources_go_by_name(monkeypatch, lazy):
  data = config.Data(source='digits')
  source = sources.load(data, 'valid')
  if lazy:  # A source that reads labels on access.
    wrapped = base._RelabeledSource(source, np.arange(10, dtype=np.int32), source.class_names)
    monkeypatch.setitem(sources._LOADERS, 'digits', lambda data, split: wrapped)
  reverse = tuple('9876543210')
  mapped = sources.load(data, 'valid', reverse)
  assert mapped.class_names == reverse
  indices = np.arange(len(source))
  np.testing.assert_array_equal(
    mapped.gather(indices)['label'], 9 - source.gather(indices)['label']
  )
  some = tuple('abcde98765')
  with pytest.raises(errors.DataError, match='the run does not know: 0, 1, 2'):
    sources.load(data, 'valid', some)
  data = config.Data(source='digits', unknown_classes='leave_out')
  if lazy:
    with pytest.raises(errors.DataError, match='does not know'):
      sources.load(data, 'valid', some)
  else:
    left = sources.load(data, 'valid', some)
    assert sorted(set(left.labels)) == [5, 6, 7, 8, 9]


def content(root):
  return base.describe(load(root)[0])['content']


def test_content_is_recognized_wherever_it_is(tmp_path, monkeypatch):
  write(tmp_path / 'here', {'a': 20, 'b': 20})
  before = content(tmp_path / 'here')
  (tmp_path / 'here').rename(tmp_path / 'there')
  assert content(tmp_path / 'there') == before
  monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  assert content(tmp_path / 'there') == before
  (damaged, *_, last) = sorted((tmp_path / 'there' / 'a').glob('*.png'))
  damaged.write_bytes(damaged.read_bytes() + b'0')
  assert base.is_same_content(before, content(tmp_path / 'there'))
  last.rename(last.with_name('renamed.png'))
  assert not base.is_same_content(before, content(tmp_path / 'there'))


def test_as_many_other_images_with_the_same_names_differ(tmp_path):
  write(tmp_path / 'here', {'a': 20, 'b': 20})
  before = content(tmp_path / 'here')
  for path in (tmp_path / 'here').rglob('*.png'):
    write_image(path, 255 - int(path.stem))
  assert not base.is_same_content(before, content(tmp_path / 'here'))


def test_a_third_of_other_images_differ(tmp_path):
  write(tmp_path / 'here', {'a': 20, 'b': 20})
  before = content(tmp_path / 'here')
  for path in sorted((tmp_path / 'here').rglob('*.png'))[::3]:
    write_image(path, 255 - int(path.stem))
  assert not base.is_same_content(before, content(tmp_path / 'here'))


def test_content_of_sources_without_files():
  data = config.Data(source='digits')
  train, valid = (base.describe(sources.load(data, s))['content'] for s in ('train', 'valid'))
  assert len(train) == 33 and train[0] == '1617'
  assert not base.is_same_content(train, valid)


def test_summary_names_what_was_understood(tmp_path):
  write(tmp_path, SPLITS | {'@eaDir': 2})
  (tmp_path / 'train' / 'notes.txt').write_text('')
  text = base.summary(load(tmp_path)[0], 'train')
  for part in ('20 images', 'train', 'a 10, b 10', '@eaDir', 'notes.txt'):
    assert part in text
