"""Too little memory ends a job with one line that names the settings to change."""

import pytest

from tests.support import processes

pytestmark = pytest.mark.faults

FAULT = ('little_memory', 3)  # GiB


def message(job):
  """Returns the last line of a job that failed without a traceback."""
  assert job.codes() == [1], job.log()[-3000:]
  assert 'Traceback' not in job.log()
  (line,) = [line for line in job.log().splitlines() if line.startswith('error: ')]
  assert 'RESOURCE_EXHAUSTED' in line
  return line


def test_training(workdir):
  # At the end, a job waits only a few seconds for threads that read batches, so the batch is small.
  sizes = '--config.train.batch_size=4096', '--config.model.flow.width=768'
  layers = [f'--config.model.{name}=1' for name in ('flow.blocks', 'flow.layers', 'prior.layers')]
  job = processes.Job(
    workdir, '--config=configs/quickstart.py', *sizes, *layers, devices=1, fault=FAULT
  )
  line = message(job)
  keys = 'train.accumulation_steps', 'model.remat', 'mesh.fsdp', 'train.batch_size'
  positions = [line.index(f'--config.{key} (now ') for key in keys]
  assert positions == sorted(positions)
  assert 'out of memory in training' in line and 'parameters' in line and 'temporaries' in line


def test_sampling(run):
  settings = [f'sampling.{s}=10000000' for s in ('batch_size', 'count')]
  settings.append('sampling.inverse=sequential')
  line = message(processes.start_job('sample', run, *settings, devices=1, fault=FAULT))
  assert 'parameters per device' in line
  assert line.index('--config.sampling.batch_size (now 10000000)') < line.index(
    'config.mesh.tensor'
  )


def test_likelihood_with_a_traceback(run):
  flags = f'--config=configs/from_run.py:{run}', '--job=likelihood', '--debug'
  batch = '--config.likelihood.batch_size=10000000'
  job = processes.Job(run, *flags, batch, devices=1, fault=FAULT)
  assert job.codes() == [1]
  lines = job.log().splitlines()
  assert any(line.startswith('Traceback') for line in lines)
  assert lines[-1].startswith('error: out of memory in likelihood')
