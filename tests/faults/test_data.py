"""Training on data that break while it runs: files and records; and other orders of them."""

import dataclasses
import json
import os
import shutil
import sys
import threading
import time

import numpy as np
import PIL.Image
import pytest
from absl import flags, logging

from farmer_jax import config, errors
from farmer_jax.data import bad_examples, base, pipeline, sources
from tests.data import test_tfds

COUNT = 24


@pytest.fixture
def root(tmp_path, monkeypatch):
  """A folder of images that are decoded when they are read; image i is of the colour 10 * i."""
  monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])  # Grain's workers read flags, which `absl.app.run` parses elsewhere.
  for index in range(COUNT):
    PIL.Image.new('L', (9, 8), 10 * index).save(tmp_path / f'{index:02}.png')
  return tmp_path


@pytest.fixture
def said(monkeypatch):
  """The warnings logged, a list."""
  messages = []
  monkeypatch.setattr(
    logging, 'warning', lambda message, *args: messages.append(message % args if args else message)
  )
  return messages


def settings(root, **changes):
  values = {'image_size': 4, 'num_classes': 0, 'valid_fraction': 0.05, 'prefetch': 2}
  return config.Data(source='folder', path=str(root), **{**values, **changes})


def load(root, split='train'):
  return sources.load(settings(root), split)


def stream(source, batch_size=4, seed=3, share=(0, 1), **changes):
  return pipeline.train_iterator(source, settings('', **changes), batch_size, seed, *share)


def take(iterator, batches=12):
  """Colours of the next images, [batches * B]."""
  return np.concatenate([next(iterator)['image'][:, 0, 0, 0] for _ in range(batches)])


def colours(source):
  """What is in the source, read from the names of its files."""
  return np.array([10 * int(path.stem) for path in source.paths], np.uint8)


def other_image(path):
  PIL.Image.new('RGBA', (300, 5), (1, 2, 3, 255)).save(path)


def fifo(path):
  """Puts a pipe in the place of a file: reading it waits for ever."""
  path.unlink()
  os.mkfifo(path)


DAMAGE = {
  'truncated': (lambda path: os.truncate(path, 50), 'truncated|broken|bytes|EOF'),
  'empty': (lambda path: os.truncate(path, 0), 'not a JPEG, PNG'),
  'garbage': (lambda path: path.write_bytes(b'\x89PNG\r\n\x1a\n' + b'!' * 99), 'PNG'),
  'gone': (lambda path: path.unlink(), 'No such file'),
  'folder': (lambda path: (path.unlink(), path.mkdir()), 'Is a directory'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_bad_file_is_replaced(root, said, kind):
  source = load(root)
  whole = take(stream(source))
  damage, reason = DAMAGE[kind]
  damage(source.paths[5])
  iterator = stream(source)
  found = take(iterator)
  bad = whole == colours(source)[5]
  other = bad_examples.substitute(5, 0, len(source))
  assert bad.sum() >= 2
  np.testing.assert_array_equal(found[~bad], whole[~bad])
  np.testing.assert_array_equal(found[bad], colours(source)[other])
  assert len(said) == bad.sum()
  for message in said:
    name = f'{source.paths[5]} cannot be read ('
    assert message.startswith(name)
    assert f'; {source.paths[other]} takes its place. Bad training examples: 1 of' in message
    assert any(part in message for part in reason.split('|'))
  assert iterator.bad_examples == 1
  expected = {'bad_examples': 1, 'replaced_examples': bad.sum(), 'worker_restarts': 0}
  assert iterator.counts() == expected


def test_image_of_another_size_and_mode_is_an_image(root, said):
  source = load(root)
  other_image(source.paths[5])
  iterator = stream(source)
  assert 2 in take(iterator)
  assert not said
  assert not iterator.bad_examples


def test_whole_data_stay_in_order_whoever_reads(root, said):
  """Threads, workers and processes replace the same examples by the same."""
  source = load(root)
  for index in (1, 7, 8, 20):
    source.paths[index].unlink()
  alone = stream(source, threads=1, prefetch=1)
  expected = take(alone)
  np.testing.assert_array_equal(take(stream(source, threads=4, prefetch=5)), expected)
  parts = [stream(source, share=(p, 2)) for p in range(2)]
  halves = [np.reshape(take(part), (12, 2)) for part in parts]
  np.testing.assert_array_equal(np.concatenate(halves, 1).reshape(-1), expected)
  before = len(said)
  workers = stream(source, workers=2)
  np.testing.assert_array_equal(take(workers), expected)
  assert workers.counts() == alone.counts()
  assert len(said) - before == alone.counts()['replaced_examples']
  workers.close()


def test_replacement_that_is_bad_too(root, said):
  source = load(root)
  first = bad_examples.substitute(5, 0, len(source))
  second = bad_examples.substitute(5, 1, len(source))
  assert len({5, first, second}) == 3
  for index in (5, first):
    source.paths[index].unlink()
  whole = bad_examples.Reader(source, 10)(np.array([5]))
  assert whole[0]['image'][0, 0, 0, 0] == colours(source)[second]
  assert [failure.index for failure in whole[1]] == [5, first]


def test_counts_go_on_after_resuming(root, said):
  source = load(root)
  for index in (2, 11):
    source.paths[index].unlink()
  iterator = stream(source)
  take(iterator, 6)
  state = json.loads(json.dumps(iterator.get_state()))
  counts = iterator.counts()
  assert counts['bad_examples'] == 2
  expected = take(iterator)
  fresh = stream(source)
  fresh.set_state(state)
  assert fresh.counts() == counts
  np.testing.assert_array_equal(take(fresh), expected)
  assert fresh.counts() == iterator.counts()
  assert fresh.get_state() == iterator.get_state()
  assert '2 of at most 10' in said[-1]


def test_batches_read_ahead_do_not_count(root, said):
  source = load(root)
  for path in source.paths:
    path.unlink()
  iterator = stream(source)
  iterator.start_prefetch()
  time.sleep(0.2)
  assert not iterator.bad_examples
  assert not said


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('limit', [0, 2])
def test_more_bad_files_than_the_limit(root, said, limit, workers):
  source = load(root)
  for index in (3, 9, 14):
    source.paths[index].unlink()
  iterator = stream(source, max_bad_examples=limit, workers=workers)
  with pytest.raises(errors.ConfigError) as caught:
    take(iterator)
  message = str(caught.value)
  assert '\n' not in message
  assert f'--config.data.max_bad_examples={limit}' in message
  last = next(path for path in source.paths if message.startswith(str(path)))
  assert last in {source.paths[index] for index in (3, 9, 14)}
  assert str(last) not in ' '.join(said)
  assert len({line.partition(' cannot')[0] for line in said}) == limit
  iterator.close()


def test_known_bad_examples_do_not_count_again(root, said):
  """The limit is of examples, not of epochs."""
  source = load(root)
  source.paths[3].unlink()
  iterator = stream(source, max_bad_examples=1)
  take(iterator, 60)
  assert iterator.bad_examples == 1
  assert iterator.counts()['replaced_examples'] == len(said) >= 10


def test_nothing_can_be_read(root, said):
  source = load(root)
  for path in source.paths:
    path.unlink()
  with pytest.raises(errors.ConfigError, match='more of the training examples are bad than'):
    next(stream(source))
  with pytest.raises(errors.ConfigError, match=r'neither can 99 others .* \(No such file'):
    next(stream(source, max_bad_examples=1000))


def test_validation_leaves_bad_examples_out(root, said):
  source = load(root)
  source.paths[6].unlink()
  batches = list(pipeline.valid_batches(source, 4, data=settings(root)))
  seen = np.concatenate([batch['index'][batch['mask']] for batch in batches])
  np.testing.assert_array_equal(seen, np.delete(np.arange(len(source)), 6))
  assert all(batch['image'].shape == (4, 4, 4, 1) for batch in batches)
  assert len(said) == 1
  assert f'{source.paths[6]} cannot be read' in said[0]
  assert 'it is left out. Bad validation examples: 1 of' in said[0]
  with pytest.raises(errors.ConfigError, match='validation examples are bad'):
    list(pipeline.valid_batches(source, 4, data=settings(root, max_bad_examples=0)))
  with pytest.raises(errors.ConfigError, match='cannot be read'):
    list(pipeline.valid_batches(source, 4))


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  """A prepared TFDS data set in one ArrayRecord file, in a folder to copy."""
  folder = tmp_path_factory.mktemp('records')
  noise = np.random.default_rng(0).integers(0, 256, (COUNT, 70, 70, 3), np.uint8)
  examples = [{'image': pixels, 'label': 0} for pixels in noise]
  splits = {'train': examples, 'test': examples[:2]}
  test_tfds.prepare(folder, 'animals', test_tfds.BOTH, splits)
  return folder


def zero(path):
  """Makes zeros of a part in the middle, as a failing disk does."""
  start = path.stat().st_size // 2
  with path.open('r+b') as stream:
    stream.seek(start)
    stream.write(bytes(start // 2))


RECORD_DAMAGE = {
  'truncated': (lambda path: os.truncate(path, path.stat().st_size // 2), True),
  'zeroed': (zero, True),
  'gone before it was opened': (lambda path: path.unlink(), False),
}


@pytest.mark.parametrize('kind', RECORD_DAMAGE)
def test_bad_records(root, records, said, kind):
  shutil.copytree(records, root / 'tfds')
  data = settings(root / 'tfds', num_classes=3, channels=3)
  source = sources.load(dataclasses.replace(data, source='animals'), 'train')
  damage, opened = RECORD_DAMAGE[kind]
  if opened:
    source[0]
  damage(next((root / 'tfds').rglob('*train*array_record*')))
  iterator = stream(source, max_bad_examples=COUNT - 1)
  if not opened:
    with pytest.raises(errors.ConfigError, match=r'of animals cannot be read \(.*No such file'):
      take(iterator)
    return
  assert take(iterator).shape == (48,)
  assert 0 < iterator.bad_examples < COUNT
  assert len({line.partition(' cannot')[0] for line in said}) == iterator.bad_examples
  for line in said:
    assert line.startswith('example ')
    assert ' of animals cannot be read (' in line
    assert '\n' not in line


@pytest.mark.parametrize('workers', [0, 1])
def test_other_order(root, workers):
  source = load(root)
  first = stream(source)
  take(first, 5)
  state = json.loads(json.dumps(first.get_state()))
  assert state['order'] == 0
  same = take(first)
  iterator = stream(source, workers=workers)
  iterator.set_state(state)
  iterator.change_order()
  assert iterator.order == 1
  other = take(iterator, 3)
  assert (other != same[:12]).any()
  later = iterator.get_state()
  other = np.concatenate([other, take(iterator, 9)])
  fresh = stream(source)
  fresh.set_state(later)
  assert fresh.order == 1
  np.testing.assert_array_equal(take(fresh, 9), other[12:])
  fresh.set_state(state)
  np.testing.assert_array_equal(take(fresh), same)
  iterator.close()


def test_every_change_of_order_is_another(root):
  """Also after going back twice to a checkpoint of the first order."""
  source = load(root)
  iterator = stream(source)
  state = iterator.get_state()
  seen = [tuple(take(iterator))]
  for expected in (1, 2, 3):
    iterator.set_state(state)
    iterator.change_order()
    assert iterator.order == expected
    seen.append(tuple(take(iterator)))
  assert len(set(seen)) == 4
  again = stream(source)
  again.change_order(2)
  assert tuple(take(again)) == seen[2]
  epochs = np.array(seen[2][: 2 * len(source)]).reshape(2, -1)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.sort(colours(source)), (2, 1)))


def test_states_of_before_still_load(root):
  source = load(root)
  first = stream(source)
  take(first, 5)
  names = ('batches', 'examples', 'batch_size', 'seed')
  old = {name: first.get_state()[name] for name in names}
  fresh = stream(source)
  fresh.change_order()
  fresh.set_state(old)
  np.testing.assert_array_equal(take(fresh), take(first))


def test_pipe_in_the_folder_does_not_hang_loading(root):
  fifo(root / '03.png')
  with pytest.raises(errors.ConfigError, match=r'03\.png .*not a regular file'):
    for split in ('train', 'valid'):
      load(root, split)


def test_threads_end_with_their_iterator(root):
  before = threading.active_count()
  iterator = stream(load(root), threads=3)
  take(iterator, 2)
  assert threading.active_count() == before + 3
  del iterator
  deadline = time.monotonic() + 5
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() == before
