"""Training on one unusable batch, on consecutive unusable batches, and permanent divergence."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax import config as config_lib
from farmer_jax import errors, losses
from farmer_jax.data import pipeline
from farmer_jax.jobs import pretrain
from farmer_jax.training import divergence
from farmer_jax.workdir import metrics
from tests.support import runs as tiny_run

TRAIN = dataclasses.replace(
  tiny_run.CONFIG.train, steps=12, log_every=1, checkpoint_every=4, max_consecutive_skips=2
)
CONFIG = dataclasses.replace(tiny_run.CONFIG, train=TRAIN)


def poison(monkeypatch, poisoned):
  """Makes the loss NaN for each batch for which poisoned(order, batches taken) is true."""
  take, nll_loss = pipeline.TrainIterator.__next__, losses.nll_loss

  def marked(self):
    batch = take(self)
    if poisoned(self.order, self.get_state()['batches']):
      batch = batch | {'label': np.full_like(batch['label'], -1)}
    return batch

  def loss(params, batch, *args, **settings):
    value, values = nll_loss(params, batch, *args, **settings)
    value = jnp.where((batch['label'] < 0).any(), jnp.nan, value)
    return value, values | {'loss': value}

  monkeypatch.setattr(pipeline.TrainIterator, '__next__', marked)
  monkeypatch.setattr(losses, 'nll_loss', loss)


def test_rollback_avoids_consecutive_bad_batches(monkeypatch, tmp_path, caplog):
  """Batches 6 to 9 are unusable in order 0. The run restores step 4 and changes the order."""
  poison(monkeypatch, lambda order, batches: order == 0 and 6 <= batches < 10)
  pretrain.run(CONFIG, tmp_path / 'run')
  assert 'step 8: 2 consecutive updates were unusable' in caplog.text
  records = [r for r in metrics.read(tmp_path / 'run') if r['split'] == 'train']
  assert [r['step'] for r in records] == list(range(1, 13))
  assert [r.get('data_order', 0) for r in records] == [0] * 4 + [1] * 8
  assert all(np.isfinite(r['loss']) and r['skipped_updates'] == 0 for r in records)
  (file,) = (tmp_path / 'run' / 'divergence').iterdir()
  found = json.loads(file.read_text())
  assert found['rollbacks'] == 1 and len(found['log_det_blocks']) == 2
  assert np.shape(found['flow_log_scale']) == (2, 2)
  assert found['informative_log_scale'][0] < found['informative_log_scale'][1]


def test_one_bad_batch_is_skipped(monkeypatch, tmp_path, caplog):
  poison(monkeypatch, lambda order, batches: batches == 6)
  pretrain.run(CONFIG, tmp_path / 'run')
  assert 'unusable' not in caplog.text
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
  assert [r['skipped_updates'] for r in records if r['split'] == 'train'] == [0] * 5 + [1] * 7
  assert records[5]['loss'] is None and records[6]['loss'] is not None
  rates = [r['learning_rate'] for r in records if r['split'] == 'train']
  assert rates[5] == rates[4]  # The schedule counts updates, not steps.


@pytest.mark.faults
def test_divergence_ends_with_a_diagnosis(tmp_path):
  """A learning rate of 1000 makes training diverge."""
  optimizer = config_lib.Optimizer(learning_rate=1e3, warmup_steps=0)
  train = dataclasses.replace(TRAIN, steps=60, max_rollbacks=1, checkpoint_every=0)
  train = dataclasses.replace(train, optimizer=optimizer)
  with pytest.raises(errors.DivergenceError) as raised:
    pretrain.run(dataclasses.replace(CONFIG, train=train), tmp_path / 'run')
  message = str(raised.value)
  assert '\n' not in message and 'learning_rate' in message and '1 rollbacks' in message
  assert 'in flow block' in message and 'mixture scales from' in message
  assert len(list((tmp_path / 'run' / 'divergence').iterdir())) >= 1


def test_unusual_log_determinants_are_reported(tmp_path, caplog):
  monitor = divergence.DivergenceMonitor(TRAIN, tmp_path)
  rng = np.random.default_rng(0)
  for k in range(60):
    metrics = {'log_det_block_0': rng.normal(), 'log_det_block_1': 2 + k / 20, 'loss': k}
    monitor.check_log_dets(k, metrics)
  assert not caplog.messages
  monitor.check_log_dets(60, {'log_det_block_0': 0.1, 'log_det_block_1': -80.0, 'loss': 60})
  monitor.check_log_dets(
    61, {'log_det_block_0': float('nan'), 'log_det_block_1': -80.0, 'loss': 60}
  )
  first, second = caplog.messages
  assert 'step 60' in first and 'blocks 1 (-80,' in first
  assert 'step 61' in second and 'blocks 0 (nan,' in second
