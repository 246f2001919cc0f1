"""Jobs with a workdir in an object store: killed training, all other jobs, two processes."""

import functools
import json
import signal

import jax
import numpy as np
import pytest
from etils import epath

import farmer_jax
from farmer_jax import config as config_lib
from farmer_jax.checkpoints import orbax_internals
from farmer_jax.evaluation import classifier, feature_networks
from farmer_jax.workdir import layout, metrics
from tests.support import processes, stores

pytest.importorskip('gcp_storage_emulator', reason='make stores installs the emulators')
pytestmark = pytest.mark.stores
orbax_internals.support_s3()  # for the comparison of checkpoints


@pytest.fixture(scope='module', params=['gs', 's3'])
def store(request, tmp_path_factory):
  with stores.running(request.param, tmp_path_factory.mktemp('store')) as running:
    yield running


@pytest.fixture(scope='module')
def killed(store, tmp_path_factory):
  """A run in the store that was killed after a checkpoint and resumed, and its log."""
  workdir = layout.absolute(store.url) / 'killed'
  log = tmp_path_factory.mktemp('logs') / 'killed'
  job = processes.train(workdir, logs=log, devices=1)
  job.wait_for(lambda: (workdir / 'checkpoints' / '4' / 'commit_success.txt').exists())
  job.kill()
  assert not (workdir / 'checkpoints' / '8').exists()
  again = processes.train(workdir, logs=log, devices=1).finish()
  return workdir, again.log()


def test_killed_run_resumes_bit_exactly(killed, uninterrupted):
  workdir, log = killed
  assert 'Resuming from step' in log
  processes.assert_equal(workdir, epath.Path(uninterrupted))


def test_run_has_all_results(killed):
  workdir, log = killed
  names = {file.name for file in workdir.iterdir()}
  assert {'config.json', 'classes.json', 'data.json', 'metrics.jsonl', 'figures'} <= names
  assert any(name.startswith('events.out.tfevents') for name in names)
  assert 'lock' not in names
  assert [r['step'] for r in metrics.read(workdir) if r['split'] == 'train'] == list(range(1, 9))
  assert 'Traceback' not in log


def test_sampling_likelihood_and_fidelity(killed, tmp_path, monkeypatch):
  workdir, _ = killed
  monkeypatch.setattr(classifier, '_STEPS', 20)
  data = config_lib.from_config_dict(layout.read_config(workdir)).data
  feature_networks.load_classifier(data, workdir / 'fidelity', 50)
  for name, overrides in (
    ('sample', ['sampling.count=20', 'sampling.batch_size=10']),
    ('likelihood', ['likelihood.examples=50', 'likelihood.batch_size=50']),
    ('fidelity', ['fidelity.count=40', 'sampling.batch_size=40', 'fidelity.batch_size=40']),
  ):
    job = processes.start_job(name, workdir, *overrides, logs=tmp_path / name, devices=1)
    job.finish(timeout=150)
    assert 'Traceback' not in job.log()
  reports = list(workdir.glob('*/*/*.json'))
  assert reports and all(json.loads(report.read_text()) for report in reports)


def test_export_to_a_local_folder(killed, tmp_path):
  workdir, _ = killed
  job = functools.partial(processes.start_job, 'export', workdir, devices=1)
  job(f'export.path={tmp_path / "e"}', logs=tmp_path / 'local').finish(timeout=150)
  found, expected = (farmer_jax.load(path).params for path in (tmp_path / 'e', workdir))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert '| negative log-likelihood' in (tmp_path / 'e' / 'README.md').read_text()
  refused = job(logs=tmp_path / 'store')
  assert refused.codes() == [1] and 'config.export.path' in refused.log().splitlines()[-1]


def test_runs_that_start_from_a_run_in_the_store(killed, store, tmp_path):
  """A branch without changes ends like its source. A tuned run is extended."""
  source, folder = killed[0], layout.absolute(store.url)
  branch, tuned = folder / 'branch', folder / 'tuned'
  setting = f'branch_from={source}/checkpoints/4'
  processes.train(branch, setting, logs=tmp_path / 'branch', devices=1).finish()
  found, expected = processes.final_state(branch), processes.final_state(source)
  assert found.keys() == expected.keys()
  assert all((found[path] == expected[path]).all() for path in found)
  for steps in 2, 4:
    settings = f'init_from={source}', f'train.steps={steps}', 'train.extend=keep_final'
    processes.train(tuned, *settings, logs=tmp_path / 'tuned', devices=1).finish()
  assert layout.read_config(tuned)['train']['extensions'] == '2:2:keep_final'
  assert len((tuned / 'config_history.jsonl').read_text().splitlines()) == 1


def test_student_of_a_teacher_in_the_store(killed, store, tmp_path):
  teacher, student = killed[0], layout.absolute(store.url) / 'student'
  overrides = f'teacher={teacher}', 'job=distill'
  job = processes.train(student, *overrides, logs=tmp_path / 'student', devices=1).finish()
  assert 'Traceback' not in job.log()


def test_two_processes(store, tmp_path, uninterrupted):
  workdir = layout.absolute(store.url) / 'two'
  processes.train(workdir, logs=tmp_path / 'two', devices=1, processes=2).finish()
  processes.assert_close(workdir, epath.Path(uninterrupted))


def test_preempted_run_keeps_its_metrics_and_its_profile(store, tmp_path):
  workdir = layout.absolute(store.url) / 'preempted'
  changes = 'train.steps=2000', 'profile.steps=2,3'
  job = processes.train(workdir, *changes, logs=tmp_path / 'preempted', devices=1)
  job.wait_for(lambda: (workdir / 'checkpoints' / '4' / 'commit_success.txt').exists())
  job.processes[0].send_signal(signal.SIGTERM)
  assert job.codes() != [0] and 'Saved step' in job.log()
  steps = [r['step'] for r in metrics.read(workdir) if r['split'] == 'train']
  assert len(steps) >= 4 and steps == list(range(1, steps[-1] + 1))
  assert not (workdir / 'lock').exists()
  assert list((workdir / 'profile').iterdir())
