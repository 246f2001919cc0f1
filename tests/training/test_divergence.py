"""Training on one unusable batch, on consecutive unusable batches, and permanent divergence."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax import errors, losses
from farmer_jax.data import pipeline
from farmer_jax.jobs import pretrain
from farmer_jax.training import divergence
from tests.support import models, runs

TRAIN = dict(steps=12, log_every=1, checkpoint_every=4, max_consecutive_skips=2)
CONFIG = models.replace(runs.CONFIG, train=TRAIN)


def test_bad_batch_is_skipped_and_rollback_avoids_consecutive_ones(monkeypatch, tmp_path, caplog):
  """The loss of batches 3 and 6 to 9 in order 0 is NaN.

  The run skips the update of step 3. At step 8 it restores step 4 and changes the order.
  """
  take, nll_loss = pipeline.TrainIterator.__next__, losses.nll_loss

  def marked(self):
    batch = take(self)
    if not self.order and self.get_state()['batches'] in (3, 6, 7, 8, 9):
      batch = batch | {'label': np.full_like(batch['label'], -1)}
    return batch

  def loss(params, batch, *args, **settings):
    value, values = nll_loss(params, batch, *args, **settings)
    value = jnp.where((batch['label'] < 0).any(), jnp.nan, value)
    return value, values | {'loss': value}

  monkeypatch.setattr(pipeline.TrainIterator, '__next__', marked)
  monkeypatch.setattr(losses, 'nll_loss', loss)
  pretrain.run(CONFIG, tmp_path / 'run')
  assert caplog.text.count('unusable') == 1
  assert 'step 8: 2 consecutive updates were unusable' in caplog.text
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
  records = [r for r in records if r['split'] == 'train']
  assert [r['step'] for r in records] == list(range(1, 13))
  assert [r.get('data_order', 0) for r in records] == [0] * 4 + [1] * 8
  assert [r['skipped_updates'] for r in records] == [0] * 2 + [1] * 10
  assert [r['step'] for r in records if r['loss'] is None] == [3]
  # The schedule counts updates, not steps.
  assert records[2]['learning_rate'] == records[1]['learning_rate'] < records[3]['learning_rate']
  (file,) = (tmp_path / 'run' / 'divergence').iterdir()
  found = json.loads(file.read_text())
  assert found['rollbacks'] == 1 and len(found['log_det_blocks']) == 2
  assert np.shape(found['flow_log_scale']) == (2, 2)
  assert found['informative_log_scale'][0] < found['informative_log_scale'][1]


@pytest.mark.faults
def test_divergence_ends_with_a_diagnosis(tmp_path):
  """A learning rate of 1000 makes training diverge."""
  train = dict(steps=60, max_rollbacks=1, checkpoint_every=0)
  train |= dict(optimizer=dict(learning_rate=1e3, warmup_steps=0))
  with pytest.raises(errors.DivergenceError) as raised:
    pretrain.run(models.replace(CONFIG, train=train), tmp_path / 'run')
  message = str(raised.value)
  assert '\n' not in message and 'learning_rate' in message and '1 rollbacks' in message
  assert 'in flow block' in message and 'mixture scales from' in message
  assert len(list((tmp_path / 'run' / 'divergence').iterdir())) >= 1


def test_unusual_log_determinants_are_reported(tmp_path, caplog):
  monitor = divergence.DivergenceMonitor(CONFIG.train, tmp_path)
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
