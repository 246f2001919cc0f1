"""Sample quality during training, on tiny runs with a classifier that is trained for few steps."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from farmer_jax.evaluation import classifier, feature_networks, training_fidelity
from farmer_jax.jobs import fidelity, pretrain
from farmer_jax.training import loop
from tests.support import models, processes, runs

NAMES = [f'classifier_{name}' for name in ('frechet_distance', 'precision', 'recall')]


def tiny(**train):
  changes = dict(keep_checkpoints=1, keep_best=1, best_metric='fidelity')
  changes |= dict(fidelity_every=2, fidelity_count=50, fidelity_scales='0,1.5') | train
  settings = dict(batch_size=20, inverse='sequential')
  return models.replace(runs.training_config(**changes), sampling=settings)


@pytest.fixture(scope='module', autouse=True)
def _short_training():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(classifier, '_STEPS', 40)
    yield


@pytest.fixture(scope='module')
def trained_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  pretrain.run(tiny(), workdir)
  return workdir


def measured(workdir):
  return {r['step']: r for r in processes.records(workdir) if r['split'] == 'fidelity'}


def test_training_records_the_quality_of_samples(trained_run):
  records = measured(trained_run)
  assert list(records) == [2, 4, 6, 8]
  names = {f'{name}_scale_{scale}' for name in NAMES for scale in ('0', '1.5')}
  for record in records.values():
    assert set(record) == names | {'step', 'split', 'time'}
    assert all(np.isfinite(record[name]) for name in names)
  assert records[2] != records[4] and records[2]['classifier_frechet_distance_scale_0'] > 1
  assert Image.open(trained_run / 'figures' / 'curves.png').size[0] == 1650


def test_checkpoint_of_the_lowest_distance_is_kept(trained_run):
  distances = {
    step: min(value for name, value in record.items() if 'frechet' in name)
    for step, record in measured(trained_run).items()
  }
  best = min(distances, key=lambda step: (distances[step], -step))
  kept = sorted(int(path.name) for path in (trained_run / 'checkpoints').iterdir())
  assert kept == sorted({best, 8})


def test_score_is_the_lowest_distance_over_the_scales():
  metrics = {
    'fid_scale_0': 3.0,
    'fid_scale_1': 2.0,
    'precision_scale_0': 0.5,
    'recall_scale_1': 0.0,
  }
  assert training_fidelity.lowest_distance(metrics) == 2.0


def test_finished_run_loads_no_network(trained_run, tmp_path, monkeypatch):
  """A run that resumes loads it before the training step is compiled."""
  load = mock.Mock(side_effect=InterruptedError)
  monkeypatch.setattr(feature_networks, 'load', load)
  workdir = shutil.copytree(trained_run, tmp_path / 'run')
  pretrain.run(tiny(), workdir)
  assert not load.called
  shutil.rmtree(workdir / 'checkpoints' / str(processes.STEPS))
  monkeypatch.setattr(loop.Trainer, 'train', lambda self: pytest.fail('training starts'))
  with pytest.raises(InterruptedError):
    pretrain.run(tiny(), workdir)


@pytest.mark.parametrize('scale', [0.0, 1.5])
def test_fidelity_job_reports_the_same(trained_run, scale):
  """The job draws samples of the last checkpoint. It compares more than these metrics."""
  built = models.replace(
    tiny(), sampling=dict(guidance=dict(scale=scale)), fidelity=dict(count=50, name='job')
  )
  fidelity.run(built, trained_run)
  report = json.loads((trained_run / 'fidelity' / 'job.json').read_text())
  assert report['checkpoint_step'] == 8
  record = measured(trained_run)[8]
  for name in NAMES:
    np.testing.assert_allclose(record[f'{name}_scale_{scale:g}'], report[name], rtol=1e-3)


@pytest.mark.faults
def test_resumed_run_measures_the_same(trained_run, tmp_path):
  """The run ends after step 4 has been measured and saved."""
  with runs.interrupted_after(batches=5):
    pretrain.run(tiny(), tmp_path / 'run')
  assert list(measured(tmp_path / 'run')) == [2, 4]
  pretrain.run(tiny(), tmp_path / 'run')
  processes.assert_equal(trained_run, tmp_path / 'run')
