"""Training whose worker processes die, or whose file system hangs."""

import contextlib
import fcntl
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from farmer_jax import errors
from farmer_jax.data import base, prefetching
from tests.faults import test_data
from tests.faults.test_data import colours, fifo, load, stream, take

root, said = test_data.root, test_data.said


def release(path):
  """Ends the waiting of who reads a pipe."""
  while path.exists():
    with contextlib.suppress(OSError):
      os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
      return


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
      raise errors.ConfigError('label 12 is outside')

  def unforeseen(index):
    if index == 7:
      raise UnpicklableError('this', threading.Lock())

  for workers in (0, 1):
    iterator = stream(Odd(wrong_label), workers=workers)
    assert error_of(iterator, errors.ConfigError) == 'label 12 is outside'
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
  with pytest.raises(errors.ConfigError) as caught:
    take(iterator, 6)
  message = str(caught.value)
  assert f'after {restarts} others (--config.data.max_worker_restarts)' in message
  assert ('SIGSEGV' if how == 'SIGSEGV' else 'exit code 0') in message
  assert '\n' not in message
  assert len(said) == restarts
  iterator.close()


def test_worker_that_dies_while_nobody_waits(root):
  iterator = stream(
    Odd(lambda index: os._exit(0)), workers=1, max_worker_restarts=0, stall_limit_seconds=10
  )
  iterator.start_prefetch()
  deadline = time.monotonic() + 120
  for alive in (True, False):  # Looking makes `multiprocessing` forget it once it has ended.
    while bool(workers_of()) != alive:
      assert time.monotonic() < deadline
      time.sleep(0.01)
  with pytest.raises(errors.ConfigError, match='exit code 0, after 0 others'):
    next(iterator)


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
  with pytest.raises(errors.ConfigError) as caught:
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
  patience = prefetching.Patience(0.05, 0)
  ahead = prefetching.ReadAhead(lambda number: time.sleep(0.5) or number, 1, 1)
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
