"""Jobs of two processes: they exchange values, train, resume, evaluate and sample."""

import json
import shutil

import jax
import numpy as np
import pytest

from farmer_jax import errors
from farmer_jax.distributed import processes as processes_lib
from tests.support import processes
from tests.support.processes import STEPS, start_job, train


def test_two_processes_exchange_values_and_errors(workdir):
  module = 'tests.support.programs.exchange_values'
  job = processes.Job(workdir, devices=1, processes=2, module=module).finish()
  results = [json.loads(job.log(process).splitlines()[-1]) for process in range(2)]
  shared = {'gathered': [[], ['long text']]}
  assert results[0] == shared | {'error': 'WorkdirError', 'left_alone': True}
  assert results[1] == shared | {'error': 'ProcessError'}


@pytest.mark.parametrize(
  'arguments, flag',
  [
    ((None, None, 0), '--coordinator'),
    (('localhost:1', 2, None), '--process_id'),
    (('localhost:1', 2, 2), '--process_id=2'),
  ],
)
def test_wrong_flags_are_refused(arguments, flag):
  with pytest.raises(errors.ConfigError, match=flag):
    processes_lib.start(*arguments)


@pytest.fixture
def initialized(monkeypatch):
  """Arguments with which JAX connects the processes, without a connection."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *a, **k: calls.append((*a, k)))
  return calls


def test_distributed_without_a_cluster_names_the_flags(monkeypatch):
  def initialize(*unused, **options):
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(errors.ConfigError, match='found no .*SLURM.*--coordinator'):
    processes_lib.start()


def open_mpi_5(monkeypatch, size, local_size):
  for name, value in dict(SIZE=size, RANK=1, LOCAL_SIZE=local_size, LOCAL_RANK=1).items():
    monkeypatch.setenv(f'OMPI_COMM_WORLD_{name}', str(value))
  monkeypatch.delenv('OMPI_MCA_orte_hnp_uri', raising=False)
  monkeypatch.setenv('PMIX_NAMESPACE', 'prterun-host-123@1')


def test_open_mpi_5_on_one_host(monkeypatch, initialized):
  open_mpi_5(monkeypatch, 2, 2)
  processes_lib.start()
  ((address, size, rank, options),) = initialized
  host, port = address.split(':')
  assert (host, size, rank) == ('localhost', 2, 1) and 1024 < int(port) < 65536
  assert options['cluster_detection_method'] is None


def test_open_mpi_5_on_several_hosts_needs_mpi4py(monkeypatch, initialized):
  open_mpi_5(monkeypatch, 16, 8)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(errors.ConfigError, match='mpi4py'):
    processes_lib.start()
  monkeypatch.setattr('importlib.util.find_spec', lambda name: name)
  processes_lib.start()
  assert initialized[0][3]['cluster_detection_method'] == 'mpi4py'


@pytest.mark.faults
@pytest.mark.parametrize('setting', ['config.mesh.data=3', 'config.train.batch_size=7'])
def test_wrong_settings_cause_one_line_and_no_workdir(workdir, setting):
  job = processes.Job(workdir, '--config=configs/quickstart.py', f'--{setting}')
  assert job.codes(timeout=120) == [1]
  assert setting in job.log() and 'Traceback' not in job.log()
  assert not workdir.exists()


@pytest.mark.faults
def test_two_processes_resume_after_a_kill_and_one_process_evaluates(uninterrupted, workdir):
  """The parameters are sharded over four devices, two per process."""
  job = train(workdir, 'mesh.fsdp=4', processes=2)
  job.wait_for(lambda: any((workdir / 'checkpoints').glob('[0-9]')))
  job.kill()
  before = processes.records(workdir)
  assert not processes.last_checkpoint(workdir).exists(), 'the processes were killed too late'
  train(workdir, 'mesh.fsdp=4', processes=2).finish()
  assert processes.resumed_step(before, workdir) > 0
  processes.assert_close(uninterrupted, workdir)
  start_job('likelihood', workdir).finish()
  report = json.loads((workdir / 'likelihood' / 'digits-valid.json').read_text())
  last = [r for r in processes.records(workdir) if r['split'] == 'valid'][-1]
  assert report['count'] == 180
  np.testing.assert_allclose(report['bits_per_dim']['mean'], last['bits_per_dim'], rtol=1e-5)


@pytest.mark.faults
def test_two_processes_sample_and_process_zero_evaluates(run):
  """One file holds all samples, so that process 1 draws none."""
  settings = ['fidelity.count=40', 'fidelity.reference_split=valid', 'fidelity.name=found']
  settings.append('sampling.inverse=sequential')
  fault = ('short_classifier', 20)
  start_job('fidelity', run, *settings, processes=2, fault=fault).finish()
  assert json.loads((run / 'fidelity' / 'found.json').read_text())['count'] == 40


@pytest.mark.faults
def test_samples_of_two_processes_equal_those_of_one(trained, tmp_path):
  settings = ['sampling.count=1200', 'sampling.inverse=sequential', 'sampling.batch_size=200']
  samples = []
  for count in (1, 2):
    workdir = shutil.copytree(trained, tmp_path / f'by-{count}')
    start_job('sample', workdir, *settings, processes=count).finish()
    (folder,) = (p for p in (workdir / 'samples').iterdir() if p.is_dir())
    files = [np.load(file) for file in sorted(folder.glob('*.npz'))]
    assert [len(file['arr_0']) for file in files] == [1000, 200]
    samples.append(np.concatenate([file['arr_0'] for file in files]).astype(int))
    assert json.loads((folder / 'samples.json').read_text())['count'] == 1200
  difference = abs(samples[0] - samples[1])
  assert difference.max() <= 1 and (difference > 0).mean() < 0.01
  assert len(np.unique(samples[0], axis=0)) == 1200


@pytest.mark.faults
@pytest.mark.parametrize(
  'first, second',
  [
    (dict(devices=8), dict(devices=2)),
    pytest.param(dict(processes=2), dict(devices=1), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_resume_on_other_devices(uninterrupted, workdir, first, second):
  train(workdir, 'mesh.fsdp=2', **first).finish()
  for step in (STEPS, STEPS - 2):
    shutil.rmtree(workdir / 'checkpoints' / str(step), ignore_errors=True)
  before = processes.records(workdir)
  train(workdir, **second).finish()
  assert processes.resumed_step(before, workdir) == STEPS - 4
  processes.assert_close(uninterrupted, workdir)
