"""Tiny pretraining runs: results, reproducibility and bit-exact resumption."""

import numpy as np
import pytest
from PIL import Image

from farmer_jax import config, errors, terminal
from farmer_jax.jobs import pretrain
from tests.support import models, processes, runs

STEPS = processes.STEPS
tiny = runs.training_config


@pytest.fixture(name='uninterrupted', scope='module')
def _uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
  pretrain.run(tiny(), workdir)
  return workdir


def test_run_writes_its_results(uninterrupted):
  assert (uninterrupted / 'config.json').exists()
  assert np.asarray(Image.open(uninterrupted / 'figures' / 'curves.png')).std() > 0
  assert sorted(int(p.name) for p in (uninterrupted / 'checkpoints').iterdir()) == [6, 8]
  assert list(uninterrupted.glob('events.out.tfevents.*'))
  records = processes.records(uninterrupted)
  train = [r for r in records if r['split'] == 'train']
  assert [r['step'] for r in train] == list(range(1, STEPS + 1))
  assert [r['step'] for r in records if r['split'] == 'valid'] == [4, 8]
  assert train[-1]['loss'] < train[0]['loss']
  for r in records:
    terms = r['nll_informative'] + r['nll_redundant'] + r['log_det']
    np.testing.assert_allclose(r['loss'], terms, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(r['bits_per_dim'], r['loss'] / np.log(2) + 7, rtol=1e-6)
  for r in train:
    blocks = r['log_det_block_0'] + r['log_det_block_1']
    np.testing.assert_allclose(r['log_det'], blocks, atol=1e-6)
    assert r['images_per_second'] > 0 and r['learning_rate'] > 0


def test_coupling_flow_trains(tmp_path):
  pretrain.run(
    models.replace(tiny(validate_every=0), model=dict(flow=dict(kind='coupling'))), tmp_path / 'run'
  )
  losses = [record['loss'] for record in processes.records(tmp_path / 'run')]
  assert len(losses) == STEPS and losses[-1] < losses[0] - 0.01


def test_interrupted_run_resumes_bit_exactly(uninterrupted, tmp_path, monkeypatch):
  """The run ends after step 5 and resumes from step 4. Step 5 runs twice and is logged once.

  The range of profiled steps starts before the checkpoint and ends after the last step.
  """
  bars, create = [], terminal.progress_bar
  monkeypatch.setattr(
    terminal, 'progress_bar', lambda *a, **k: bars.append(create(*a, **k)) or bars[-1]
  )
  workdir = tmp_path / 'run'
  with runs.interrupted_after(batches=5) as caught:
    pretrain.run(tiny(), workdir)
  # The traceback keeps the bars alive. An open bar would print a line after the error message.
  assert caught.tb and bars and all(bar.disable for bar in bars)
  assert processes.records(workdir)[-1]['step'] == 5
  monkeypatch.undo()
  profile = config.Profile(steps=f'2,{STEPS + 9}')
  pretrain.run(models.replace(tiny(), profile=profile), workdir)
  processes.assert_equal(uninterrupted, workdir)
  assert list((workdir / 'profile').rglob('*.xplane.pb'))


def test_finished_run_reports_again_without_training(uninterrupted, capsys):
  before = (uninterrupted / 'metrics.jsonl').read_text()
  pretrain.run(tiny(), uninterrupted)
  assert 'bits/dim' in capsys.readouterr().out
  assert (uninterrupted / 'metrics.jsonl').read_text() == before


def test_run_with_another_configuration_is_refused(uninterrupted):
  before = sorted(str(p) for p in uninterrupted.rglob('*'))
  with pytest.raises(errors.UserError, match='train.batch_size'):
    pretrain.run(tiny(batch_size=32), uninterrupted)
  assert sorted(str(p) for p in uninterrupted.rglob('*')) == before
