"""A disk that is full while a run trains: only the last checkpoint is necessary."""

import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest

from tests.support import filesystems, processes

pytestmark = pytest.mark.faults
STEPS = 100


@pytest.fixture
def start(tmp_path):
  """Starts a training run in a mount namespace, in which `disk` is a file system of 16 MB.

  Returns the process and the disk as it is visible from outside. The run is copied to tmp_path.
  """
  (disk := tmp_path / 'disk').mkdir()
  mount = f'mount -t tmpfs -o size=16m tmpfs {disk}'
  if subprocess.run(['unshare', '-rm', 'sh', '-c', mount], capture_output=True).returncode:
    pytest.skip('mounting is not allowed')

  def run(*overrides):
    settings = (f'--config.{setting}' for setting in (*processes.SETTINGS, *overrides))
    command = [sys.executable, '-m', 'farmer_jax.main', '--config=configs/quickstart.py', *settings]
    script = (
      f'{mount}; {shlex.join(command)} --workdir={disk}/run; code=$?; cp -r {disk}/run {tmp_path};'
      ' exit $code'
    )
    how = dict(cwd=processes.ROOT, env=processes.environment(1), stderr=subprocess.STDOUT)
    with (tmp_path / 'log').open('w') as log:
      process = subprocess.Popen(['unshare', '-rm', 'sh', '-c', script], stdout=log, **how)
    return process, pathlib.Path(f'/proc/{process.pid}/root{disk}')

  return run


def wait_for(process, condition):
  deadline = time.monotonic() + 300
  while not condition():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)


def test_disk_is_full_for_some_steps(start, tmp_path):
  process, disk = start(
    f'train.steps={STEPS}', 'train.sample_every=5', 'train.checkpoint_every=5', 'sampling.count=4'
  )
  log = tmp_path / 'log'
  wait_for(process, lambda: (disk / 'run' / 'checkpoints' / '10').exists())
  filesystems.fill(disk / 'filler')
  wait_for(process, lambda: 'Metrics cannot be written' in log.read_text())
  wait_for(process, lambda: len(re.findall('saving checkpoint .* failed', log.read_text())) > 1)
  (disk / 'filler').unlink()
  assert process.wait(timeout=300) == 0, log.read_text()[-3000:]

  text, run = log.read_text(), tmp_path / 'run'
  assert 'Traceback' not in text
  for what in 'The grid of samples', 'TensorBoard events':
    assert re.search(f'{what} .*No space left on device', text), text[-3000:]
  steps = [record['step'] for record in processes.records(run) if record['split'] == 'train']
  assert steps == list(range(1, STEPS + 1))
  assert (run / 'checkpoints' / str(STEPS)).exists() and (run / 'samples' / f'{STEPS}.png').exists()


def test_disk_that_stays_full_fails_the_last_checkpoint_only(start, tmp_path):
  process, disk = start('train.steps=30', 'train.checkpoint_every=5')
  wait_for(process, lambda: (disk / 'run' / 'checkpoints' / '10').exists())
  filesystems.fill(disk / 'filler')
  assert process.wait(timeout=300) == 1
  text = (tmp_path / 'log').read_text()
  assert 'Traceback' not in text and 'error: saving checkpoint 30 failed' in text
  assert (tmp_path / 'run' / 'checkpoints' / '10').exists()
