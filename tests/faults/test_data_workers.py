"""Worker processes that die or hang, and files that are slow or hang."""

import fcntl
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest

from farmer_jax import errors
from tests.support import data as data_lib
from tests.support import processes
from tests.support.data import IndexSource, train_iterator, values

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def _parse_flags():
  data_lib.parse_flags()


@pytest.fixture
def source(tmp_path, monkeypatch):
  return data_lib.folder_source(tmp_path / 'images', monkeypatch)


def worker_processes():
  return [c for c in multiprocessing.active_children() if c.name.startswith('grain')]


class UnpicklableError(Exception):
  def __init__(self, first, second):
    super().__init__(f'{first} and {second}')


def at_7(act):
  """Calls `act` when example 7 is read."""
  return IndexSource(20, lambda index: act() if index == 7 else None)


def raise_data_error():
  raise errors.DataError('label 12 is outside')


def raise_unpicklable_error():
  raise UnpicklableError('this', threading.Lock())


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize(
  'act, kind, message',
  [
    (raise_data_error, errors.DataError, '^label 12 is outside'),
    (raise_unpicklable_error, RuntimeError, '^reading example 7: UnpicklableError: this and'),
  ],
)
def test_exceptions_of_a_source(act, kind, message, workers):
  iterator = train_iterator(at_7(act), workers=workers)
  with pytest.raises(kind, match=message):
    values(iterator)
  iterator.close()


def test_two_killed_workers_are_restarted_and_replace_the_same_examples(source, caplog):
  data_lib.remove(source, 1, 7, 8, 20)
  threads, iterator = train_iterator(source), train_iterator(source, workers=2)
  for batch in range(25):
    if batch in (4, 13):
      os.kill(worker_processes()[-1].pid, signal.SIGKILL)
    np.testing.assert_array_equal(values(iterator, 1), values(threads, 1))
  assert iterator.counts() == threads.counts() | {'worker_restarts': 2}
  restarts = [message for message in caplog.messages if 'restarting at batch' in message]
  assert len(restarts) == 2
  assert 'SIGKILL' in restarts[0] and '2 of at most 10' in restarts[1]
  assert len(caplog.messages) == 2 + 2 * threads.counts()['replaced_examples']
  state = iterator.get_state()
  for other in (threads, iterator):
    other.set_state(state)
    other.change_order()
  np.testing.assert_array_equal(values(iterator), values(threads))
  iterator.close()
  assert not worker_processes()


@pytest.mark.parametrize(
  'act, restarts, cause',
  [
    (lambda: os.kill(os.getpid(), signal.SIGSEGV), 1, 'SIGSEGV'),
    (lambda: os._exit(0), 0, 'exit code 0'),  # After exit code 0, Grain waits without limit.
  ],
)
def test_worker_that_always_dies(caplog, act, restarts, cause):
  iterator = train_iterator(at_7(act), workers=1, max_worker_restarts=restarts)
  with pytest.raises(errors.DataError, match=f'{cause}.*max_worker_restarts') as caught:
    values(iterator, 6)
  assert '\n' not in str(caught.value)
  assert len(caplog.messages) == restarts
  iterator.close()


def test_worker_that_dies_while_no_batch_is_awaited():
  source = IndexSource(20, lambda index: os._exit(0))
  iterator = train_iterator(source, workers=1, max_worker_restarts=0, stall_limit_seconds=10)
  iterator.start_prefetch()
  deadline = time.monotonic() + 120
  for alive in (True, False):  # `active_children` forgets a process that has ended.
    while bool(worker_processes()) != alive:
      assert time.monotonic() < deadline
      time.sleep(0.01)
  with pytest.raises(errors.DataError, match='exit code 0'):
    next(iterator)


def test_hanging_worker_is_reported_and_killed(source, caplog, capfd):
  stalled = data_lib.path_of(source, values(train_iterator(source))[9])
  data_lib.replace_by_fifo(stalled)
  iterator = train_iterator(
    source, workers=1, threads=1, stall_warning_seconds=0.5, stall_limit_seconds=8
  )
  with pytest.raises(errors.DataError, match='stall_limit_seconds=8'):
    values(iterator)
  assert len(caplog.messages) >= 2
  assert str(stalled) in capfd.readouterr().err  # The worker logs the file.
  assert not worker_processes()
  iterator.close()


def test_slow_file_is_reported_but_read(source, caplog):
  """Opening a file waits while another process holds a lease on it."""
  signal.signal(signal.SIGIO, signal.SIG_IGN)  # The kernel sends this signal to end a lease.
  expected = values(train_iterator(source))
  path = data_lib.path_of(source, expected[5])
  lease = os.open(path, os.O_RDWR)
  fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
  release = threading.Timer(1.5, fcntl.fcntl, (lease, fcntl.F_SETLEASE, fcntl.F_UNLCK))
  release.start()
  iterator = train_iterator(source, stall_warning_seconds=0.4)
  np.testing.assert_array_equal(values(iterator), expected)
  assert any(str(path) in message for message in caplog.messages)
  assert not any(iterator.counts().values())
  release.join()
  os.close(lease)


@pytest.mark.parametrize('fault', [pytest.param('missing', marks=pytest.mark.slow), 'stall'])
def test_run_with_failing_data_ends_with_one_line(source, tmp_path, fault):
  """The run neither prints a traceback nor waits for threads that hang."""
  overrides = (
    f'data.source=folder data.path={tmp_path / "images"} data.num_classes=0'
    ' data.valid_fraction=0.05 data.stall_warning_seconds=1 data.stall_limit_seconds=3'
    ' data.max_bad_examples=0 train.batch_size=8 train.steps=500 train.validate_every=0'
    ' train.checkpoint_every=0'
  ).split()
  job = processes.train(tmp_path / 'run', *overrides, devices=1, fault=('images_in_files',))
  job.wait_for(lambda: 'ompil' in job.log())
  for path in source.paths:
    data_lib.replace_by_fifo(path) if fault == 'stall' else path.unlink()
  assert job.codes(timeout=100) == [1], job.log()
  error = job.log().splitlines()[-1]
  assert error.startswith('error: ')
  assert job.log().count('error: ') == 1 and 'Traceback' not in job.log()
  assert ('max_bad_examples=0' if fault == 'missing' else 'stall_limit_seconds=3') in error
