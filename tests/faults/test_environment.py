"""Terminals, encodings and environment variables. A job must not depend on them."""

import os
import subprocess
import sys

import pytest

from tests.support import processes
from tests.support.processes import ROOT, train

pytestmark = pytest.mark.faults


def main(*arguments, **variables):
  """Runs the command line with environment variables."""
  return subprocess.run(
    [sys.executable, '-m', 'farmer_jax.main', *arguments],
    cwd=ROOT,
    env=os.environ | variables,
    capture_output=True,
    timeout=300,
  )


def test_closed_terminal_does_not_end_a_run(workdir, monkeypatch):
  """The terminal is closed during the run, which ignores the errors of later output."""
  terminal, side = os.openpty()
  popen = subprocess.Popen
  monkeypatch.setattr(
    subprocess, 'Popen', lambda args, **how: popen(args, **how | {'stdout': side, 'stderr': side})
  )
  job = train(workdir, 'train.steps=60', devices=1)
  job.wait_for(lambda: processes.records(workdir))
  os.close(side)
  os.close(terminal)
  assert job.codes() == [0]
  assert processes.records(workdir)[-1]['step'] == 60


def test_output_with_another_encoding(workdir, monkeypatch):
  monkeypatch.setenv('PYTHONIOENCODING', 'ascii')
  job = train(workdir, 'noise.kind=gaussian', 'noise.std_end=0.1', devices=1).finish()
  assert 'noise ? = 0.1' in job.log()
  help_text = main('--config_help', PYTHONIOENCODING='latin-1')
  assert help_text.returncode == 0 and b'Traceback' not in help_text.stderr


def test_environment_does_not_change_results(uninterrupted, workdir, monkeypatch):
  """Options of JAX and matplotlib that the environment sets do not reach the job."""
  for name, value in (
    ('JAX_ENABLE_X64', '1'),
    ('JAX_NUMPY_RANK_PROMOTION', 'raise'),
    ('JAX_NUMPY_DTYPE_PROMOTION', 'strict'),
    ('JAX_DEFAULT_PRNG_IMPL', 'rbg'),
    ('JAX_RANDOM_SEED_OFFSET', '5'),
    ('JAX_THREEFRY_PARTITIONABLE', '0'),
    ('MPLBACKEND', 'module://matplotlib_inline.backend_inline'),
  ):
    monkeypatch.setenv(name, value)
  train(workdir, devices=1).finish()
  processes.assert_equal(uninterrupted, workdir)


@pytest.mark.parametrize('name', ['JAX_ENABLE_X64', 'JAX_TRACEBACK_FILTERING'])
def test_wrong_option_of_jax_is_one_line(tmp_path, name):
  done = main('--config=configs/quickstart.py', f'--workdir={tmp_path}', **{name: 'maybe'})
  lines = done.stderr.decode().splitlines()
  assert done.returncode == 1 and len(lines) == 1
  assert lines[0].startswith('error: ') and f'{name}=maybe' in lines[0]


def test_platform_without_devices_is_one_line(tmp_path):
  done = main('--config=configs/quickstart.py', f'--workdir={tmp_path}', JAX_PLATFORMS='cuda')
  lines = done.stderr.decode().splitlines()
  assert done.returncode == 1 and len(lines) == 1
  assert lines[0].startswith('error: ') and 'JAX_PLATFORMS=cuda' in lines[0]
