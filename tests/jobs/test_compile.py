"""Compiling ahead of time, for the devices at hand and for TPUs that are not."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from farmer_jax import errors
from farmer_jax.jobs import compile as compile_job

SMALL = [
  'model.patch_size=4',
  'model.flow.blocks=3',
  'model.flow.layers=1',
  'model.flow.width=32',
  'model.flow.head_dim=16',
  'model.prior.layers=1',
  'model.prior.width=32',
  'model.prior.head_dim=16',
  'train.batch_size=16',
  'mesh.fsdp=4',
]


def compile_for(workdir, *settings):
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
  }
  command = [sys.executable, '-m', 'farmer_jax.main', '--config=configs/quickstart.py']
  command += ['--job=compile', f'--workdir={workdir}']
  command += [f'--config.{setting}' for setting in (*SMALL, *settings)]
  return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_devices_at_hand(tmp_path):
  done = compile_for(tmp_path / 'run', 'compile.sampler=True')
  assert done.returncode == 0, done.stderr
  (file,) = (tmp_path / 'run' / 'compile').iterdir()
  report = json.loads(file.read_text())
  assert report['devices'] == 8 and report['mesh'] == {'data': 2, 'fsdp': 4, 'tensor': 1}
  assert set(report['programs']) == {'training step', 'prior', 'inverse'}
  step = report['programs']['training step']
  # Parameters and two moments, float32, a quarter of them on a device, and what cannot be split.
  quarter = 3 * 4 * report['parameters'] / 4
  assert quarter < step['argument_bytes'] < 1.5 * quarter
  assert step['temporary_bytes'] > 0 and step['fits'] is None
  # Each block gathers its parameters, forwards and backwards.
  assert step['collectives']['all-gather']['count'] >= 2 * 3
  assert step['loops_of_unknown_length'] == 0
  assert 'million parameters' in done.stdout and 'all-gather' in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu')
def test_a_slice_that_is_not_there(tmp_path):
  done = compile_for(tmp_path / 'run', 'compile.topology=v5e:2x4', 'model.dtype=bfloat16')
  assert done.returncode == 0, done.stderr
  report = json.loads(
    (tmp_path / 'run' / 'compile' / 'v5e-2x4-2x4x1-16-none-bfloat16.json').read_text()
  )
  step = report['programs']['training step']
  assert report['device_kind'] == 'TPU v5 lite' and step['fits']
  assert 0 < step['estimated_mfu'] < 1 and step['loops_of_unknown_length'] == 0


def test_mistakes_get_one_line(tmp_path):
  for setting, message in (
    ('compile.topology=v99:2x2', 'cannot compile for config.compile.topology=v99:2x2'),
    ('train.batch_size=15', 'cannot be divided'),
  ):
    done = compile_for(tmp_path / 'run', setting)
    assert done.returncode == 1
    (line,) = [row for row in done.stderr.splitlines() if row.startswith('error: ')]
    assert message in line and 'Traceback' not in done.stderr
    assert not (tmp_path / 'run').exists()


class TooLarge:
  """What the compiler says of a program that does not fit."""

  def compile(self, options):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory,\n 24G of 16G')


def test_what_does_not_fit_is_said_in_one_line():
  with pytest.raises(errors.ConfigError, match='Ran out of memory, 24G of 16G') as caught:
    compile_job._compiled('sampler', TooLarge(), 'TPU v5 lite', None)
  message = str(caught.value)
  assert message.startswith('the sampler does not fit') and '\n' not in message
  assert 'config.train.batch_size' in message
