"""Being told to leave: real signals to real processes."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.support import processes

SETTINGS = ['train.steps=100000', 'train.checkpoint_every=0', 'train.validate_every=0']

# SIGTERM comes to the process itself, by its own hand, in the midst of a step.
AT_STEP_5 = """
import os, signal
from tests.support import processes
from farmer_jax.training import throughput
advance = throughput.Meter.advance
def told(self, step, values):
  if step == 5{condition}:
    os.kill(os.getpid(), signal.SIGTERM)
  return advance(self, step, values)
throughput.Meter.advance = told
"""


def test_sigterm_saves_and_asks_to_be_started_again(whole, tmp_path):
  """It leaves after step 5, where no checkpoint was due, and ends as if nothing had happened."""
  workdir = tmp_path / 'run'
  (process,) = processes.train(workdir, devices=1, before=AT_STEP_5.format(condition=''))
  assert process.wait(timeout=300) == 75, processes.log(workdir)
  assert 'Saved step 5; the same command goes on from there' in processes.log(workdir)
  assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())[-1] == 5
  processes.finish(processes.train(workdir, devices=1), workdir)
  assert 'Going on from step 5' in processes.log(workdir)
  processes.assert_equal(whole, workdir)


def test_one_process_is_told_and_all_leave_after_the_same_step(tmp_path):
  workdir = tmp_path / 'run'
  before = AT_STEP_5.format(condition=' and jax.process_index()').replace('os,', 'jax, os,')
  started = processes.train(workdir, *SETTINGS, processes=2, before=before)
  codes = [process.wait(timeout=300) for process in started]
  assert codes == [75, 75], processes.log(workdir)
  (saved,) = (int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert saved >= 5
  assert processes.records(workdir)[-1]['step'] == saved


@pytest.mark.parametrize('number', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_sigterm_ends_at_once(tmp_path, number):
  """The first comes in the midst of a step that takes ten minutes."""
  workdir, reached = tmp_path / 'run', tmp_path / 'reached'
  before = f"""
import pathlib, time
from farmer_jax.training import throughput
def slow(self, step, values):
  pathlib.Path({str(reached)!r}).touch()
  time.sleep(600)
throughput.Meter.advance = slow
"""
  started = processes.train(workdir, *SETTINGS, devices=1, processes=number, before=before)
  processes.wait_for(started, workdir, reached.exists)
  process = started[0]
  process.send_signal(signal.SIGTERM)
  deadline = time.monotonic() + 60
  while 'once more leaves at once' not in processes.log(workdir):
    assert time.monotonic() < deadline and process.poll() is None, processes.log(workdir)
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)  # the same notice, doubled
  time.sleep(1.5)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 128 + signal.SIGTERM
  processes.kill(started)


def test_a_job_with_nothing_to_save_asks_to_be_started_again(whole):
  """Sampling, told to leave while it draws; what it has drawn stays."""
  arguments = ['--job=sample', f'--config=configs/from_run.py:{whole}']
  arguments += ['--config.sampling.count=100000', '--config.sampling.inverse=sequential']
  (process,) = processes.start(whole, *arguments)
  folder = whole / 'samples'
  processes.wait_for([process], whole, lambda: list(folder.glob('*/*.npz')))
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 75


def test_the_second_run_in_a_workdir_refuses_until_the_first_is_dead(tmp_path):
  workdir = tmp_path / 'run'
  (first,) = processes.train(workdir, *SETTINGS, devices=1)
  metrics = workdir / 'metrics.jsonl'
  processes.wait_for([first], workdir, lambda: metrics.exists() and metrics.stat().st_size)
  (second,) = processes.train(workdir, *SETTINGS, devices=1)
  assert second.wait(timeout=120) == 1
  assert f'error: process {first.pid} on ' in processes.log(workdir)
  first.send_signal(signal.SIGKILL)
  first.wait()
  assert json.loads((workdir / 'lock.json').read_text())['process'] == first.pid
  (third,) = processes.train(workdir, *SETTINGS, devices=1, before=AT_STEP_5.format(condition=''))
  assert third.wait(timeout=300) == 75, processes.log(workdir)
  assert processes.records(workdir)[-1]['step'] == 5


BEATING = """
import sys, time
from etils import epath
from farmer_jax.workdir import lock
lock._BEAT, lock._LAPSE, lock._SETTLE = 0.2, 2.0, 0.3
with lock._beating(epath.Path({file!r})):
  print('held', flush=True)
  time.sleep({seconds})
"""


def test_without_locks_of_the_file_system_the_living_are_known_by_their_beat(tmp_path):
  """As on object storage: the second refuses; a dead owner's lock lapses; the end removes it."""
  file = str(tmp_path / 'lock.json')

  def start(seconds):
    command = [sys.executable, '-c', BEATING.format(file=file, seconds=seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  first = start(600)
  assert first.stdout.readline() == 'held\n'
  second = start(0)
  assert f'process {first.pid} on ' in second.communicate(timeout=60)[1]
  assert second.returncode == 1
  first.send_signal(signal.SIGKILL)
  first.communicate()
  third = start(0)
  out, err = third.communicate(timeout=60)
  assert out == 'held\n' and 'Waiting for up to 2 s' in err
  assert not (tmp_path / 'lock.json').exists()
