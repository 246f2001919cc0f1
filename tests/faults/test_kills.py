"""Runs that are killed and started again are bit-equal to a run that is never interrupted."""

import random
import shutil
import time

import pytest

from tests.support import processes
from tests.support.checkpoints import list_steps
from tests.support.processes import STEPS, train

pytestmark = pytest.mark.faults

# Two processes with one device each.
PAIR = dict(devices=1, processes=2)


def test_resume_after_a_kill_during_a_save_is_bit_exact(uninterrupted, workdir, tmp_path):
  """Checkpoint 4 is complete except for the name of its folder. Training has continued."""
  signal_file = tmp_path / 'saving'
  job = train(workdir, devices=1, fault=('slow_commit', 4, signal_file))
  job.wait_for(lambda: signal_file.exists() and len(processes.records(workdir)) > 5)
  job.kill()
  before = processes.records(workdir)
  assert (workdir / 'checkpoints/4.orbax-checkpoint-tmp').exists()
  assert not (workdir / 'checkpoints/4').exists()
  job = train(workdir, devices=1).finish()
  assert 'incomplete checkpoint 4' in job.log()
  assert processes.resumed_step(before, workdir) == 2
  processes.assert_equal(uninterrupted, workdir)
  assert not list((workdir / 'checkpoints').glob('*tmp*'))


@pytest.mark.slow
def test_resume_after_kills_at_random_times_is_bit_exact(uninterrupted, workdir):
  rng = random.Random(0)
  for _ in range(5):
    before = processes.records(workdir)
    job = train(workdir, devices=1)
    job.wait_for(lambda before=before: processes.records(workdir)[-1:] != before[-1:])
    time.sleep(rng.uniform(0, 0.5))
    job.kill()
  train(workdir, devices=1).finish()
  processes.assert_equal(uninterrupted, workdir)


@pytest.fixture(scope='module', name='pair')
def _pair(tmp_path_factory):
  """A run of two processes that is never interrupted."""
  workdir = tmp_path_factory.mktemp('pair') / 'run'
  train(workdir, 'mesh.fsdp=2', **PAIR).finish()
  return workdir


@pytest.mark.slow
def test_resume_after_one_of_two_processes_dies_during_a_save_is_bit_exact(pair, workdir, tmp_path):
  """Process 1 is killed after writing its shard of checkpoint 4. Process 0 must exit."""
  signal_file = tmp_path / 'saving'
  job = train(workdir, 'mesh.fsdp=2', fault=('slow_barrier', 4, signal_file), **PAIR)
  job.wait_for(signal_file.exists)
  job.processes[1].kill()
  assert job.codes(timeout=300)[0] != 0
  assert not (workdir / 'checkpoints/4').exists()
  before = processes.records(workdir)
  train(workdir, 'mesh.fsdp=2', **PAIR).finish()
  assert processes.resumed_step(before, workdir) == 2
  processes.assert_equal(pair, workdir)


@pytest.mark.slow
def test_two_processes_restore_the_same_checkpoint(pair, workdir):
  """Only process 1 cannot read its shard of checkpoint 8. Both processes restore checkpoint 6."""
  shutil.copytree(pair, workdir)
  before = processes.records(workdir)
  parts = processes.last_checkpoint(workdir).glob('state/ocdbt.process_1/d/*')
  max(parts, key=lambda path: path.stat().st_size).write_bytes(b'')
  job = train(workdir, 'mesh.fsdp=2', **PAIR).finish()
  assert f'heckpoint {STEPS} is corrupt' in job.log()
  assert processes.resumed_step(before, workdir) == STEPS - 2
  assert 'Traceback' not in job.log() + job.log(1)
  assert (workdir / 'checkpoints_quarantine' / str(STEPS)).exists()
  processes.assert_equal(pair, workdir)


@pytest.mark.slow
def test_training_continues_when_one_of_two_processes_cannot_save(pair, workdir):
  start = time.monotonic()
  job = train(workdir, 'mesh.fsdp=2', fault=('small_files', 4, 500), **PAIR)
  job.finish()
  assert time.monotonic() - start < 300
  assert 'checkpoint 4 failed' in job.log()
  assert list_steps(workdir) == [2, 6, 8]
  processes.assert_equal(pair, workdir)
