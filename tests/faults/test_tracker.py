"""Weights & Biases in jobs that end early, and without its own process."""

import json
import time

import psutil
import pytest

from farmer_jax.distributed import preemption
from tests.support import processes, wandb_files
from tests.support.checkpoints import list_steps

pytest.importorskip('wandb')
pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.delenv('WANDB_DIR', raising=False)


def train(workdir, *overrides, **how):
  return processes.train(workdir, 'tracker.kind=wandb', *overrides, **{'devices': 1, **how})


def service(job):
  """Returns the process of wandb that belongs to process 0."""
  (found,) = [
    child
    for child in psutil.Process(job.processes[0].pid).children()
    if 'wandb-core' in child.name()
  ]
  return found


def logged_steps(records):
  return [row['step'] for row in wandb_files.history(records) if 'train/loss' in row]


def of_kind(records, kind):
  return [getattr(r, kind) for r in records if r.WhichOneof('record_type') == kind]


def test_killed_run_resumes_as_one_run(workdir):
  """The process of wandb ends after the job. Steps after the checkpoint are logged again.

  wandb writes its file every 15 seconds, so that the last steps before the kill can be missing.
  """
  settings = 'train.steps=400', 'train.checkpoint_every=200', 'train.validate_every=0'
  job = train(workdir, *settings)
  job.wait_for(lambda: (workdir / 'checkpoints' / '200').exists())
  helper = service(job)
  job.kill()
  helper.wait(timeout=60)
  before = processes.records(workdir)
  again = train(workdir, *settings).finish()
  resumed = processes.resumed_step(before, workdir)
  assert resumed == 200, again.log()
  first, last = wandb_files.read(workdir)
  steps = logged_steps(first)
  assert steps == list(range(1, len(steps) + 1))
  assert logged_steps(last) == list(range(resumed + 1, 401))
  ids = {run.run_id for records in (first, last) for run in of_kind(records, 'run')}
  assert ids == {json.loads((workdir / 'run.json').read_text())['id']}


def test_preempted_job_of_two_processes_is_one_run(workdir):
  job = train(workdir, 'mesh.fsdp=2', processes=2, fault=('sigterm', 5, 0))
  assert job.codes() == [preemption.EXIT_CODE] * 2, job.log()
  (records,) = wandb_files.read(workdir)
  assert logged_steps(records) == list(range(1, max(list_steps(workdir)) + 1))
  assert of_kind(records, 'preempting')
  assert [end.exit_code for end in of_kind(records, 'exit')] == [preemption.EXIT_CODE]


def test_training_continues_without_the_process_of_wandb(workdir):
  job = train(workdir, 'train.steps=60')
  job.wait_for(lambda: processes.records(workdir))
  service(job).kill()
  start = time.monotonic()
  job.finish()
  assert time.monotonic() - start < 200
  assert job.log().count('Metrics for Weights & Biases are no longer written') == 1
  steps = [r['step'] for r in processes.records(workdir) if r['split'] == 'train']
  assert steps == list(range(1, 61))
