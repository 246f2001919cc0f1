"""The lock of a workdir in an object store."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from farmer_jax.errors import WorkdirError
from farmer_jax.workdir import layout, lock, store_lock
from tests.support import processes, stores

pytest.importorskip('gcp_storage_emulator', reason='make stores installs the emulators')
pytestmark = pytest.mark.stores

HOLDER = """
import sys, time
from farmer_jax.workdir import layout, lock
with lock.hold(layout.absolute(sys.argv[1])):
  print('held', flush=True)
  time.sleep(600)
"""


@pytest.fixture(scope='module', params=['gs', 's3'])
def store(request, tmp_path_factory):
  with stores.running(request.param, tmp_path_factory.mktemp('store')) as running:
    yield running


@pytest.fixture
def workdir(store, request):
  return layout.absolute(f'{store.url}/{request.node.originalname}')


@pytest.fixture
def short_lease(monkeypatch):
  monkeypatch.setattr(store_lock, '_RENEWAL', 0.2)
  monkeypatch.setattr(store_lock, '_EXPIRY', 1.0)


def hold_in_other_process(workdir):
  command = [sys.executable, '-c', HOLDER, str(workdir)]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  process = subprocess.Popen(command, cwd=processes.ROOT, text=True, **pipes)
  assert process.stdout.readline() == 'held\n'
  return process


def test_lock_is_released_at_the_end(workdir):
  for _ in range(2):
    with lock.hold(workdir):
      assert (workdir / 'lock').exists()
    assert not (workdir / 'lock').exists()


def test_only_one_of_many_processes_gets_the_lock(workdir, short_lease):
  ready, results = threading.Barrier(6), []

  def take():
    ready.wait()
    try:
      with store_lock.hold(workdir):
        results.append('held')
        time.sleep(2)
    except WorkdirError:
      results.append('refused')

  threads = [threading.Thread(target=take) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(results) == ['held'] + 5 * ['refused']


def test_running_owner_is_named(workdir, monkeypatch):
  monkeypatch.setattr(store_lock, '_EXPIRY', 25.0)  # longer than the interval of renewals
  owner = hold_in_other_process(workdir)
  with pytest.raises(WorkdirError, match=f'process {owner.pid} on .* is training'):
    lock.hold(workdir).__enter__()
  owner.kill()
  owner.wait()
  start = time.monotonic()
  with lock.hold(workdir):  # The owner was a process of this machine and no longer exists.
    assert time.monotonic() - start < 5


def test_lock_that_is_released_while_another_run_waits(workdir, monkeypatch):
  monkeypatch.setattr(store_lock, '_EXPIRY', 3.0)
  is_held, start = threading.Event(), time.monotonic()

  def hold():
    with store_lock.hold(workdir):
      is_held.set()
      time.sleep(1)

  threading.Thread(target=hold).start()
  is_held.wait()
  with lock.hold(workdir):
    assert 1 < time.monotonic() - start < 3


def test_lock_of_a_process_on_another_machine_expires(workdir, short_lease, monkeypatch, caplog):
  owner = hold_in_other_process(workdir)
  owner.kill()
  owner.wait()
  monkeypatch.setattr(store_lock, '_identity', lambda: {'pid': 1, 'machine': 'another'})
  caplog.set_level('INFO')
  start = time.monotonic()
  with lock.hold(workdir):
    assert time.monotonic() - start > 1
  assert f'process {owner.pid}' in caplog.text


def test_owner_that_lost_the_lock_ends(workdir, short_lease):
  owner = hold_in_other_process(workdir)
  owner.send_signal(signal.SIGSTOP)  # like a machine that was suspended
  with lock.hold(workdir):
    owner.send_signal(signal.SIGCONT)
    assert owner.wait(timeout=60) == 1
  assert 'has taken over' in owner.stderr.read()


def test_unreadable_lock_expires(workdir, short_lease):
  (workdir / 'lock').write_text('{"owner": ')
  with lock.hold(workdir):
    pass
