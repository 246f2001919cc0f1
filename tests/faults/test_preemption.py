"""Signals to processes that train or sample."""

import pathlib
import signal
import time

import pytest

from farmer_jax.distributed import preemption
from tests.support import processes
from tests.support.checkpoints import list_steps
from tests.support.processes import train

pytestmark = pytest.mark.faults

ENDLESS = ['train.steps=100000', 'train.checkpoint_every=0', 'train.validate_every=0']


def test_resume_after_sigterm_is_bit_exact(uninterrupted, workdir):
  """The run saves a checkpoint after step 5, although none was due, and exits with code 75."""
  job = train(workdir, devices=1, fault=('sigterm', 5, 0))
  assert job.codes() == [preemption.EXIT_CODE], job.log()
  assert max(list_steps(workdir)) == 5
  before = processes.records(workdir)
  train(workdir, devices=1).finish()
  assert processes.resumed_step(before, workdir) == 5
  processes.assert_equal(uninterrupted, workdir)


@pytest.mark.parametrize('name', ['SIGINT', 'SIGHUP', 'SIGUSR1'])
def test_other_signals_save_too(workdir, name):
  """Ctrl-C, a closed terminal, and the notice of SLURM."""
  job = train(workdir, *ENDLESS, devices=1)
  job.wait_for(lambda: processes.records(workdir))
  job.processes[0].send_signal(signal.Signals[name])
  assert job.codes() == [preemption.EXIT_CODE], job.log()
  (saved,) = list_steps(workdir)
  assert processes.records(workdir)[-1]['step'] == saved
  assert name in job.log() and 'Traceback' not in job.log()


@pytest.mark.parametrize('seconds', [0, 0.3, 0.8])
def test_ctrl_c_before_training_ends_the_job_at_once(workdir, seconds):
  """An exception in the imports of JAX would be lost, or printed as an error of JAX."""
  job = train(workdir, *ENDLESS, devices=1)
  maps = pathlib.Path(f'/proc/{job.processes[0].pid}/maps')
  job.wait_for(lambda: 'jaxlib' in maps.read_text())  # The imports of JAX have begun.
  time.sleep(seconds)
  job.processes[0].send_signal(signal.SIGINT)
  assert job.codes(timeout=60) == [preemption.EXIT_CODE], job.log()
  assert 'Traceback' not in job.log()
  assert 'Interrupted' in job.log() or 'Saved step' in job.log()


def test_ignored_signals_stay_ignored():
  """nohup makes a process ignore SIGHUP."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with preemption.PreemptionListener() as listener:
      signal.raise_signal(signal.SIGHUP)
      assert not listener.should_stop(1)
      signal.raise_signal(signal.SIGUSR1)
      assert listener.should_stop(1)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
  finally:
    signal.signal(signal.SIGHUP, before)


def test_all_processes_stop_after_the_same_step(workdir):
  """Only process 1 receives SIGTERM."""
  job = train(workdir, *ENDLESS, processes=2, fault=('sigterm', 5, 1))
  assert job.codes() == [preemption.EXIT_CODE] * 2, job.log()
  (saved,) = list_steps(workdir)
  assert saved >= 5
  assert processes.records(workdir)[-1]['step'] == saved


@pytest.mark.parametrize('number', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_second_sigterm_exits_at_once(tmp_path, number):
  """The first SIGTERM arrives during a step that takes ten minutes."""
  signal_file = tmp_path / 'in-step'
  fault = ('slow_step', signal_file)
  job = train(tmp_path / 'run', *ENDLESS, devices=1, processes=number, fault=fault)
  job.wait_for(signal_file.exists)
  process = job.processes[0]
  process.send_signal(signal.SIGTERM)
  job.wait_for(lambda: 'SIGTERM' in job.log(), seconds=60)
  process.send_signal(signal.SIGTERM)  # ignored as a duplicate within one second
  time.sleep(1.5)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 128 + signal.SIGTERM
  job.kill()


def test_sampling_exits_at_once(run):
  """SIGTERM arrives after the first samples have been written."""
  settings = ['sampling.count=100000', 'sampling.inverse=sequential']
  job = processes.start_job('sample', run, *settings)
  job.wait_for(lambda: list((run / 'samples').glob('*/*.npz')))
  job.processes[0].send_signal(signal.SIGTERM)
  assert job.codes(timeout=60) == [preemption.EXIT_CODE]


def test_second_run_in_a_workdir_is_refused_until_the_first_is_killed(workdir):
  first = train(workdir, *ENDLESS, devices=1)
  first.wait_for(lambda: processes.records(workdir))
  second = train(workdir, *ENDLESS, devices=1)
  assert second.codes(timeout=120) == [1]
  assert f'process {first.processes[0].pid} on ' in second.log()
  first.kill()
  third = train(workdir, *ENDLESS, devices=1, fault=('sigterm', 5, 0))
  assert third.codes() == [preemption.EXIT_CODE], third.log()
  assert processes.records(workdir)[-1]['step'] == 5
