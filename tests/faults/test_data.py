"""Training on data that break while it runs: files, records, worker processes, file systems."""

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import PIL.Image
import pytest
from absl import flags, logging

from farmer_jax import config
from farmer_jax.data import base, faults, pipeline, readahead, sources

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


def release(path):
  """Ends the waiting of who reads a pipe."""
  while path.exists():
    with contextlib.suppress(OSError):
      os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
      return


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
  other = faults.substitute(5, 0, len(source))
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
  first = faults.substitute(5, 0, len(source))
  second = faults.substitute(5, 1, len(source))
  assert len({5, first, second}) == 3
  for index in (5, first):
    source.paths[index].unlink()
  whole = faults.Reader(source, 10)(np.array([5]))
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
  with pytest.raises(config.ConfigError) as caught:
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
  with pytest.raises(config.ConfigError, match='more of the training examples are bad than'):
    next(stream(source))
  with pytest.raises(config.ConfigError, match=r'neither can 99 others .* \(No such file'):
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
  with pytest.raises(config.ConfigError, match='validation examples are bad'):
    list(pipeline.valid_batches(source, 4, data=settings(root, max_bad_examples=0)))
  with pytest.raises(config.ConfigError, match='cannot be read'):
    list(pipeline.valid_batches(source, 4))


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  """A prepared TFDS data set in one ArrayRecord file, in a folder to copy."""
  path = pathlib.Path(__file__).parents[1] / 'data' / 'test_tfds.py'
  spec = importlib.util.spec_from_file_location('test_tfds_helpers', path)
  test_tfds = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(test_tfds)
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
    with pytest.raises(config.ConfigError, match=r'of animals cannot be read \(.*No such file'):
      take(iterator)
    return
  assert take(iterator).shape == (48,)
  assert 0 < iterator.bad_examples < COUNT
  assert len({line.partition(' cannot')[0] for line in said}) == iterator.bad_examples
  for line in said:
    assert line.startswith('example ')
    assert ' of animals cannot be read (' in line
    assert '\n' not in line


class Odd(base.Source):
  """Examples that are their index; some do as they please."""

  class_names = ()

  def __init__(self, act):
    self.act = act

  def __len__(self):
    return 20

  def __getitem__(self, index):
    self.act(index)
    return {'image': np.full((2, 2, 1), index, np.uint8), 'label': np.int32(index)}


class UnpicklableError(Exception):
  def __init__(self, first, second):
    super().__init__(f'{first} and {second}')


def error_of(iterator, kind):
  with pytest.raises(kind) as caught:
    take(iterator)
  iterator.close()
  return str(caught.value)


def test_exceptions_in_workers(root):
  def wrong_label(index):
    if index == 7:
      raise config.ConfigError('label 12 is outside')

  def unforeseen(index):
    if index == 7:
      raise UnpicklableError('this', threading.Lock())

  for workers in (0, 1):
    iterator = stream(Odd(wrong_label), workers=workers)
    assert error_of(iterator, config.ConfigError) == 'label 12 is outside'
    message = error_of(stream(Odd(unforeseen), workers=workers), RuntimeError)
    assert message.startswith('reading example 7: UnpicklableError: this and')


def workers_of():
  return [c for c in multiprocessing.active_children() if c.name.startswith('grain')]


@pytest.mark.parametrize('count', [1, 2])
def test_killed_worker_is_started_again(root, said, count):
  source = load(root)
  alone, iterator = stream(source), stream(source, workers=count)
  for batch in range(25):
    if batch in (4, 13):
      victim = workers_of()[-1]
      os.kill(victim.pid, signal.SIGKILL)
    np.testing.assert_array_equal(take(iterator, 1), take(alone, 1))
  assert iterator.counts()['worker_restarts'] == 2
  assert len(said) == 2
  assert 'ended by SIGKILL: perhaps for want of memory; starting again at batch' in said[0]
  assert 'Restarts: 2 of at most 10' in said[1]
  assert iterator.get_state()['worker_restarts'] == 2
  iterator.close()
  assert not workers_of()


@pytest.mark.parametrize('how, restarts', [('SIGSEGV', 1), ('exit', 0)])
def test_worker_that_dies_again_and_again(root, said, how, restarts):
  def die(index):
    if index == 7:
      if how == 'exit':
        os._exit(0)  # Which Grain takes for an orderly end, and waits for ever.
      os.kill(os.getpid(), signal.SIGSEGV)

  iterator = stream(Odd(die), workers=1, max_worker_restarts=restarts)
  with pytest.raises(config.ConfigError) as caught:
    take(iterator, 6)
  message = str(caught.value)
  assert f'after {restarts} others (--config.data.max_worker_restarts)' in message
  assert ('SIGSEGV' if how == 'SIGSEGV' else 'exit code 0') in message
  assert '\n' not in message
  assert len(said) == restarts
  iterator.close()


@pytest.mark.parametrize('workers', [0, 1])
def test_stall_is_reported_and_ends(root, said, workers, capfd):
  source = load(root)
  expected = take(stream(source))
  first = list(colours(source)).index(expected[9])
  fifo(source.paths[first])
  iterator = stream(
    source, workers=workers, threads=1, stall_seconds=0.5, stall_limit_seconds=1.8 + 6 * workers
  )
  start = time.monotonic()
  with pytest.raises(config.ConfigError) as caught:
    take(iterator)
  message = str(caught.value)
  assert 1.7 < time.monotonic() - start < 30
  assert message.startswith('no training data for ')
  assert '\n' not in message
  assert len(said) >= 2
  assert said[0].startswith('Waiting for training data for ')
  if workers:
    assert f'{source.paths[first]}: a worker process has been reading it' in capfd.readouterr().err
    assert not workers_of()
  else:
    assert str(source.paths[first]) in said[-1]
    assert str(source.paths[first]) in message
    release(source.paths[first])
  iterator.close()


def test_slow_file_is_only_reported(root, said):
  """Opening a file waits while another process holds a lease on it."""
  signal.signal(signal.SIGIO, signal.SIG_IGN)  # With which the kernel asks for the lease.
  source = load(root)
  expected = take(stream(source))
  path = source.paths[list(colours(source)).index(expected[5])]
  lease = os.open(path, os.O_RDWR)
  fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
  release = threading.Timer(1.5, fcntl.fcntl, (lease, fcntl.F_SETLEASE, fcntl.F_UNLCK))
  release.start()
  iterator = stream(source, stall_seconds=0.4)
  np.testing.assert_array_equal(take(iterator), expected)
  assert any(f'of them for {path}' in line for line in said)
  assert iterator.counts() == dict.fromkeys(iterator.counts(), 0)
  release.join()
  os.close(lease)


def test_no_limit_of_waiting():
  patience = readahead.Patience(0.05, 0)
  ahead = readahead.ReadAhead(lambda number: time.sleep(0.5) or number, 1, 1)
  assert ahead.take(patience) == 0
  ahead.close()


PROGRAM = """
import sys
from absl import app
from farmer_jax.data import base
from farmer_jax import main
base.IN_MEMORY_BYTES = 0
sys.argv = ['main', '--config=configs/quickstart.py', *sys.argv[1:]]
if __name__ == '__main__':
  main.run()
"""


@pytest.mark.parametrize('fault', [pytest.param('bad', marks=pytest.mark.slow), 'stall'])
def test_program_ends_with_one_line(root, tmp_path, fault):
  """A run whose data fail stops; it neither shows a traceback nor waits for hanging threads."""
  small = {'source': 'folder', 'num_classes': 0, 'valid_fraction': 0.05}
  small |= {'stall_seconds': 1, 'stall_limit_seconds': 3, 'max_bad_examples': 0}
  arguments = [f'--config.data.{name}={value}' for name, value in small.items()]
  arguments += ['--config.train.batch_size=8', '--config.train.steps=500']
  arguments += [f'--config.data.path={root}', f'--workdir={tmp_path / "run"}']
  program = tmp_path / 'program.py'
  program.write_text(PROGRAM)
  process = subprocess.Popen(
    [sys.executable, program, *arguments],
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, 'PYTHONPATH': '.'},
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
  )
  for line in process.stderr:
    if 'Compiling' in line:
      break
  for path in root.glob('*.png'):
    if fault == 'bad':
      path.unlink()
    else:
      fifo(path)
  _, rest = process.communicate(timeout=100)
  assert process.returncode == 1
  errors = [line for line in rest.splitlines() if line.startswith('error: ')]
  assert len(errors) == 1
  assert 'Traceback' not in rest
  expected = 'max_bad_examples=0' if fault == 'bad' else 'stall_limit_seconds=3'
  assert expected in errors[0]
  assert rest.splitlines()[-1] == errors[0]


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
  with pytest.raises(config.ConfigError, match=r'03\.png .*not a regular file'):
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
