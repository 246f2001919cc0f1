"""Ahead-of-time compilation for the attached devices and for others that are not attached."""

import importlib.util
import json
import re
import subprocess
import sys
from unittest import mock

import jax
import pytest

from farmer_jax import config, errors
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.jobs import compile as compile_job
from farmer_jax.xla import ahead_of_time, memory
from tests.support import processes

# A mixture prior takes long to compile. tests/distributed/test_mesh.py compiles one.
SETTINGS = (
  'model.patch_size=4 model.scan_unroll=1 model.flow.blocks=3 model.flow.layers=1'
  ' model.flow.width=32 model.flow.head_dim=16 model.prior.kind=normal train.batch_size=16'
  ' mesh.fsdp=4'
)


def compile_for(workdir, *settings):
  """Runs the job. Returns the report, the name of the report file, and standard output."""
  command = [sys.executable, '-m', 'farmer_jax.main', '--config=configs/quickstart.py']
  command += ['--job=compile', f'--workdir={workdir}']
  command += [f'--config.{setting}' for setting in (*SETTINGS.split(), *settings)]
  environment = processes.environment(devices=8)
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr
  (file,) = (workdir / 'compile').iterdir()
  assert str(file) in done.stdout
  return json.loads(file.read_text()), file.name, done.stdout


def test_attached_devices(tmp_path):
  settings = 'compile.sampler=True', 'train.optimizer.kind=adamw'
  report, _, output = compile_for(tmp_path, *settings)
  assert report['devices'] == 8 and report['mesh'] == {'data': 2, 'fsdp': 4, 'tensor': 1}
  assert set(report['programs']) == {'training step', 'prior', 'inverse'}
  step = report['programs']['training step']
  # Parameters and two moments in float32. A device holds a quarter of each sharded array.
  quarter = 3 * 4 * report['parameters'] / 4
  assert quarter < step['argument_bytes'] < 1.5 * quarter
  assert step['temporary_bytes'] > 0 and step['fits'] is None
  # Each of three blocks gathers its parameters in the forward and in the backward pass.
  assert step['collectives']['all-gather']['count'] >= 2 * 3 and 'all-gather' in output
  assert step['loops_of_unknown_length'] == 0


@pytest.mark.slow
def test_inverse_of_a_coupling_flow_has_no_figures_per_token(tmp_path):
  report, *_ = compile_for(tmp_path, 'compile.sampler=True', 'model.flow.kind=coupling')
  programs = report['programs']
  assert 'decoding' in programs['prior'] and 'decoding' not in programs['inverse']
  assert programs['inverse']['loops_of_unknown_length'] == 0


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu')
def test_tpu_slice_that_is_not_attached(tmp_path):
  settings = 'compile.topology=v5e:2x4', 'model.dtype=bfloat16', 'model.prior.kind=mixture'
  report, name, output = compile_for(tmp_path, *settings, 'compile.sampler=True')
  assert re.fullmatch(r'v5e-2x4-2x4x1-16-none-bfloat16-[0-9a-f]{8}\.json', name)
  step = report['programs']['training step']
  assert report['device_kind'] == 'TPU v5 lite' and step['fits']
  assert 0 < step['estimated_mfu'] < 1 and step['loops_of_unknown_length'] == 0
  assert step['estimated_seconds'] == step['compiler_seconds'] + step['kernel_seconds']
  # The compiler's estimate is above the bound.
  assert 0 < step['roofline']['device_seconds'] < step['compiler_seconds']
  check_sampler(report, output)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('jax_cuda12_plugin'), reason='needs the plugin')
def test_gpus_that_are_not_attached(tmp_path):
  settings = 'compile.topology=h100:8', 'model.dtype=bfloat16', 'model.prior.kind=mixture'
  report, name, output = compile_for(tmp_path, *settings, 'compile.sampler=True')
  assert re.fullmatch(r'h100-8-2x4x1-16-none-bfloat16-[0-9a-f]{8}\.json', name)
  step = report['programs']['training step']
  assert report['devices'] == 8 and 'H100' in report['device_kind'] and step['fits']
  assert step['estimated_seconds'] is None and step['loops_of_unknown_length'] == 0
  limits = step['roofline']
  assert 0 < limits['bound_mfu_without_overlap'] < limits['bound_mfu'] < 1
  # The model's FLOPs are a part of the compiled ones.
  products = limits['kinds']['matrix products']['flops'] * 8
  assert 0.5 < report['flops_per_step'] / products < 1.5
  assert 'roofline, not an estimate' in output
  check_sampler(report, output)


def check_sampler(report, output):
  for name in ('prior', 'inverse'):
    decoding = report['programs'][name]['decoding']
    assert decoding['bytes_read_per_token'] >= 0 and decoding['bound_seconds_per_image'] > 0
  assert 'read on each device per token: ' in output


def test_sampler_is_traced_on_the_mesh(monkeypatch):
  """Modules ask the mesh for the platform. JAX's default device may be of another one."""
  meshes = []

  def lower(self, params, labels):
    meshes.append(jax.sharding.get_abstract_mesh())
    return {}

  monkeypatch.setattr(compile_job.sampling.Sampler, 'lower', lower)
  tiny = config.Config(compile=config.Compile(sampler=True))
  mesh = mesh_lib.Mesh(tiny.mesh, jax.devices()[:1])
  compile_job._lower(tiny, mesh)
  assert meshes == [mesh.mesh.abstract_mesh]


def test_batch_that_does_not_fit_the_mesh(tmp_path):
  train = config.Train(batch_size=15, accumulation_steps=2)
  with pytest.raises(errors.ConfigError, match='config.train.batch_size=15'):
    compile_job.run(config.Config(train=train), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_program_that_does_not_fit_into_memory():
  text = 'RESOURCE_EXHAUSTED: Ran out of memory,\n 24G of 16G'
  lowered = mock.Mock(**{'compile.side_effect': jax.errors.JaxRuntimeError(text)})
  built = config.Config(job='compile')
  with (
    pytest.raises(errors.OutOfMemoryError, match='config.train.batch_size') as caught,
    memory.explained(built),
  ):
    ahead_of_time.compile_and_measure('inverse', lowered, jax.devices())
  assert 'inverse' in str(caught.value) and '24G of 16G' in str(caught.value)
  assert '\n' not in str(caught.value)
