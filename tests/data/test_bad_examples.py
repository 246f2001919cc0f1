"""Files and records that become unreadable during training, and reads that hang."""

import dataclasses
import json
import os
import shutil
import threading
import time

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from farmer_jax import config, errors
from farmer_jax.data import base, pipeline, prefetching, reading, sources
from tests.support import data as data_lib
from tests.support.data import remove, train_iterator, values


@pytest.fixture
def source(tmp_path, monkeypatch):
  return data_lib.folder_source(tmp_path, monkeypatch)


def levels(source):
  """Returns the gray levels of the source, from the names of its files."""
  return np.array([10 * int(path.stem) for path in source.paths], np.uint8)


DAMAGE = {
  'truncated': lambda path: os.truncate(path, 50),
  'empty': lambda path: os.truncate(path, 0),
  'garbage': lambda path: path.write_bytes(b'\x89PNG\r\n\x1a\n' + b'!' * 99),
  'missing': lambda path: path.unlink(),
  'folder': lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_bad_file_is_replaced_logged_and_counted(source, caplog, kind):
  undamaged = values(train_iterator(source))
  DAMAGE[kind](source.paths[5])
  iterator = train_iterator(source, max_bad_examples=1)
  found = values(iterator)
  bad = undamaged == levels(source)[5]
  replacement = reading.replacement_index(5, 0, len(source))
  assert bad.sum() >= 2  # The limit counts examples, not reads.
  np.testing.assert_array_equal(found[~bad], undamaged[~bad])
  np.testing.assert_array_equal(found[bad], levels(source)[replacement])
  assert len(caplog.messages) == bad.sum()
  for message in caplog.messages:
    assert message.startswith(str(source.paths[5]))
    assert str(source.paths[replacement]) in message
  counts = iterator.counts()
  assert counts == {'bad_examples': 1, 'replaced_examples': bad.sum(), 'worker_restarts': 0}


def test_file_with_other_size_and_mode_is_not_bad(source, caplog):
  PIL.Image.new('RGBA', (300, 5), (1, 2, 3, 255)).save(source.paths[5])
  assert 2 in values(train_iterator(source))
  assert not caplog.messages


def test_replacements_do_not_depend_on_threads_or_processes(source):
  remove(source, 1, 7, 8, 20)
  expected = values(train_iterator(source, threads=1, prefetch=1))
  np.testing.assert_array_equal(values(train_iterator(source, threads=4, prefetch=5)), expected)
  shares = [np.reshape(values(train_iterator(source, share=(p, 2))), (12, 2)) for p in range(2)]
  np.testing.assert_array_equal(np.concatenate(shares, 1).reshape(-1), expected)


def test_bad_replacement_is_replaced(source):
  first, second = (reading.replacement_index(5, k, len(source)) for k in range(2))
  assert len({5, first, second}) == 3
  remove(source, 5, first)
  batch, bad = reading.read_batch(source, 10, np.array([5]))
  assert batch['image'][0, 0, 0, 0] == levels(source)[second]
  assert [example.index for example in bad] == [5, first]


def test_resume_keeps_counts(source):
  remove(source, 2, 11)
  iterator = train_iterator(source)
  values(iterator, 6)
  state, counts = json.loads(json.dumps(iterator.get_state())), iterator.counts()
  assert counts['bad_examples'] == 2
  expected = values(iterator)
  resumed = train_iterator(source)
  resumed.set_state(state)
  assert resumed.counts() == counts
  np.testing.assert_array_equal(values(resumed), expected)
  assert resumed.get_state() == iterator.get_state()


@pytest.mark.parametrize(
  'limit, workers', [(0, 0), (2, 0), pytest.param(2, 1, marks=pytest.mark.faults)]
)
def test_more_bad_files_than_the_limit(source, caplog, limit, workers):
  data_lib.parse_flags()
  bad = [source.paths[index] for index in (3, 9, 14)]
  remove(source, 3, 9, 14)
  iterator = train_iterator(source, max_bad_examples=limit, workers=workers)
  with pytest.raises(errors.DataError, match=f'max_bad_examples={limit}') as caught:
    values(iterator)
  iterator.close()
  (last,) = [path for path in bad if str(caught.value).startswith(str(path))]
  logged = {path for path in bad for message in caplog.messages if message.startswith(str(path))}
  assert len(logged) == limit and last not in logged


def test_no_readable_file(source, caplog):
  remove(source, *range(len(source)))
  iterator = train_iterator(source)
  iterator.start_prefetch()
  time.sleep(0.2)  # Batches that were read ahead are not counted.
  assert not caplog.messages and not any(iterator.counts().values())
  with pytest.raises(errors.DataError, match='max_bad_examples=10'):
    next(iterator)
  with pytest.raises(errors.DataError, match=r'99 replacements'):
    next(train_iterator(source, max_bad_examples=1000))


def test_evaluation_leaves_bad_examples_out(source, caplog):
  remove(source, 6)

  def batches(**settings):
    data = dataclasses.replace(source.data, **settings)
    return list(pipeline.evaluation_batches(source, 4, data=data, skip_bad_examples=True))

  seen = np.concatenate([batch['index'][batch['mask']] for batch in batches()])
  np.testing.assert_array_equal(seen, np.delete(np.arange(len(source)), 6))
  assert all(batch['image'].shape == (4, 4, 4, 1) for batch in batches())
  assert caplog.messages[0].startswith(str(source.paths[6])) and len(caplog.messages) == 2
  with pytest.raises(errors.DataError, match='max_bad_examples=0'):
    batches(max_bad_examples=0)
  with pytest.raises(base.BadExampleError, match=source.paths[6].name):
    list(pipeline.evaluation_batches(source, 4))


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  """A prepared TFDS data set in one ArrayRecord file."""
  folder = tmp_path_factory.mktemp('records')
  noise = np.random.default_rng(0).integers(0, 256, (24, 70, 70, 3), np.uint8)
  features = {'image': tfds.features.Image(shape=(None, None, 3))}
  examples = [{'image': pixels} for pixels in noise]
  data_lib.write_tfds(folder, 'noise', features, {'train': examples, 'test': examples[:2]})
  return folder


@pytest.mark.parametrize('damage', ['truncated', 'zeroed', 'missing'])
def test_bad_records_are_replaced(tmp_path, monkeypatch, records, caplog, damage):
  monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 0)
  shutil.copytree(records, tmp_path / 'tfds')
  data = config.Data('noise', str(tmp_path / 'tfds'), image_size=4, channels=3, num_classes=0)
  source = sources.load(data, 'train')
  path = next((tmp_path / 'tfds').rglob('*train*array_record*'))
  iterator = train_iterator(source, max_bad_examples=23)
  if damage == 'missing':
    path.unlink()
    with pytest.raises(errors.DataError, match='of noise '):
      values(iterator)
    return
  source[0]  # Opens the file.
  half = path.stat().st_size // 2
  if damage == 'zeroed':  # A quarter of the file, as by a failing disk.
    with path.open('r+b') as stream:
      stream.seek(half)
      stream.write(bytes(half // 2))
  else:
    os.truncate(path, half)
  assert values(iterator).shape == (48,)
  names = {message.partition(' cannot')[0] for message in caplog.messages}
  assert 0 < iterator.counts()['bad_examples'] == len(names) < 24
  assert all(' of noise ' in message and '\n' not in message for message in caplog.messages)


def test_stall_is_reported_and_ends_with_an_error(source, caplog):
  stalled = data_lib.path_of(source, values(train_iterator(source))[9])
  data_lib.replace_by_fifo(stalled)
  limits = {'stall_warning_seconds': 0.2, 'stall_limit_seconds': 0.7}
  start = time.monotonic()
  with pytest.raises(errors.DataError, match=r'stall_limit_seconds=0\.7') as caught:
    values(train_iterator(source, threads=1, **limits))
  assert 0.6 < time.monotonic() - start < 20
  assert str(stalled) in str(caught.value) and '\n' not in str(caught.value)
  assert len(caplog.messages) >= 2 and str(stalled) in caplog.messages[-1]
  os.close(os.open(stalled, os.O_WRONLY | os.O_NONBLOCK))  # Ends the read.


def test_no_limit_on_waiting():
  data = config.Data(stall_warning_seconds=0.05, stall_limit_seconds=0)
  prefetcher = prefetching.Prefetcher(
    lambda number: time.sleep(0.3) or number, data, 'training', threads=1, depth=1
  )
  assert next(prefetcher) == 0
  prefetcher.close()


def test_threads_end_with_their_iterator(source):
  before = set(threading.enumerate())
  iterator = train_iterator(source, threads=3)
  values(iterator, 2)
  started = set(threading.enumerate()) - before
  assert len(started) == 3
  del iterator
  for thread in started:
    thread.join(5)
    assert not thread.is_alive()
