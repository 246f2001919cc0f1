"""Runs that are killed and started again end as if nothing had happened, bit for bit."""

import random
import shutil
import time

import pytest

from tests.support import processes

STEPS = processes.STEPS

# Before a checkpoint gets its name, a file says so, and there is time to kill the process.
SLOW_COMMIT = """
import pathlib, time
from orbax.checkpoint._src.path import atomicity
finalize = atomicity.AtomicRenameTemporaryPath.finalize
async def slow(self, *args, **kwargs):
  if self.get_final().name == {step!r}:
    pathlib.Path({file!r}).touch()
    time.sleep(600)
  return await finalize(self, *args, **kwargs)
atomicity.AtomicRenameTemporaryPath.finalize = slow
"""

# The first process has committed, the second has not heard of it.
SLOW_SECOND = """
import pathlib, time, jax
from farmer_jax.distributed import agreement
make = agreement.make_barrier
def make_slow():
  barrier = make()
  def slow(*, key, timeout_ms):
    if 'async_write_complete' in key and '{step}' in key and jax.process_index():
      pathlib.Path({file!r}).touch()
      time.sleep(600)
    return barrier(key=key, timeout_ms=timeout_ms)
  return slow
agreement.make_barrier = make_slow
"""


def test_a_run_killed_in_the_midst_of_a_save_ends_as_if_it_had_not_been(whole, tmp_path):
  """Step 4 is written but for its name; training has gone on meanwhile."""
  workdir, signal_file = tmp_path / 'run', tmp_path / 'saving'
  before = SLOW_COMMIT.format(step='4', file=str(signal_file))
  started = processes.train(workdir, devices=1, before=before)
  processes.wait_for(
    started, workdir, lambda: signal_file.exists() and len(processes.records(workdir)) > 5
  )
  processes.kill(started)
  assert (workdir / 'checkpoints/4.orbax-checkpoint-tmp').exists()
  assert not (workdir / 'checkpoints/4').exists()
  processes.finish(processes.train(workdir, devices=1), workdir)
  assert 'The checkpoint of step 4 was never finished' in processes.log(workdir)
  assert 'Going on from step 2' in processes.log(workdir)
  processes.assert_equal(whole, workdir)
  assert not list((workdir / 'checkpoints').glob('*tmp*'))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(whole, tmp_path):
  """At some moment after the first steps of each start; the last start is left alone."""
  workdir, rng = tmp_path / 'run', random.Random(0)
  for _ in range(5):
    seen = len(processes.log(workdir)) if workdir.exists() else 0
    started = processes.train(workdir, devices=1)
    processes.wait_for(
      started, workdir, lambda seen=seen: '... took' in processes.log(workdir)[seen:]
    )
    time.sleep(rng.uniform(0, 2.5))
    processes.kill(started)
  processes.finish(processes.train(workdir, devices=1), workdir)
  processes.assert_equal(whole, workdir)


@pytest.fixture(scope='module', name='pair')
def _pair(tmp_path_factory):
  """The run of two processes that nothing happens to."""
  workdir = tmp_path_factory.mktemp('pair') / 'run'
  processes.finish(processes.train(workdir, 'mesh.fsdp=2', devices=1, processes=2), workdir)
  return workdir


@pytest.mark.slow
def test_two_processes_of_which_one_dies_in_a_save_end_as_if_it_had_not(pair, tmp_path):
  """The second is killed when it has written its part of step 4 and not said so; the first then
  stops of its own."""
  workdir, signal_file = tmp_path / 'run', tmp_path / 'saving'
  before = SLOW_SECOND.format(step='4', file=str(signal_file))
  how = {'devices': 1, 'processes': 2}
  started = processes.train(workdir, 'mesh.fsdp=2', before=before, **how)
  processes.wait_for(started, workdir, signal_file.exists)
  processes.kill(started[1:])
  assert started[0].wait(timeout=300) != 0
  assert not (workdir / 'checkpoints/4').exists()
  processes.finish(processes.train(workdir, 'mesh.fsdp=2', **how), workdir)
  assert 'Going on from step 2' in processes.log(workdir)
  processes.assert_equal(pair, workdir)


@pytest.mark.slow
def test_two_processes_agree_on_the_newest_whole_checkpoint(pair, tmp_path):
  """The second cannot read its part of step 8, the first can: both go on from step 6."""
  workdir = tmp_path / 'run'
  shutil.copytree(pair, workdir)
  parts = sorted((workdir / 'checkpoints' / str(STEPS) / 'state').glob('ocdbt.process_1/d/*'))
  max(parts, key=lambda path: path.stat().st_size).write_bytes(b'')
  how = {'devices': 1, 'processes': 2}
  processes.finish(processes.train(workdir, 'mesh.fsdp=2', **how), workdir)
  assert f'The checkpoint of step {STEPS} is damaged' in processes.log(workdir)
  assert f'Going on from step {STEPS - 2}' in processes.log(workdir)
  assert 'Traceback' not in processes.log(workdir) + processes.log(workdir, 1)
  assert (workdir / 'checkpoints_damaged' / str(STEPS)).exists()
  processes.assert_equal(pair, workdir)


# No file of step 4 that the second process writes may be larger than 500 bytes.
FULL_SECOND = """
import jax, resource
from farmer_jax.checkpoints import checkpointer
save = checkpointer.Checkpointer.save
def save_limited(self, step, *args):
  self.wait()
  if jax.process_index():
    size = 500 if step == 4 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
  save(self, step, *args)
checkpointer.Checkpointer.save = save_limited
"""


@pytest.mark.slow
def test_two_processes_of_which_one_cannot_write_go_on(pair, tmp_path):
  workdir = tmp_path / 'run'
  how = {'devices': 1, 'processes': 2, 'before': FULL_SECOND}
  start = time.monotonic()
  processes.finish(processes.train(workdir, 'mesh.fsdp=2', **how), workdir)
  assert time.monotonic() - start < 300
  assert 'the checkpoint of step 4 could not be written' in processes.log(workdir)
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == ['2', '6', '8']
  processes.assert_equal(pair, workdir)
