"""Training that goes astray: single updates, whole stretches, and for good."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from farmer_jax import config as config_lib
from farmer_jax import errors, losses
from farmer_jax.data import pipeline
from farmer_jax.jobs import pretrain
from farmer_jax.training import divergence, state, step
from farmer_jax.workdir import metrics
from tests.support import runs as tiny_run

TRAIN = dataclasses.replace(
  tiny_run.CONFIG.train, steps=12, log_every=1, checkpoint_every=4, max_skipped=2
)
CONFIG = dataclasses.replace(tiny_run.CONFIG, train=TRAIN)


def scaled(params, batch, step, part):
  """A loss whose gradient is the batch's."""
  del step, part
  loss = (params['kernel'] * batch).sum()
  return loss, {'loss': loss}


def stepper(train):
  optimizer = optax.adam(0.1)
  start = state.create({'kernel': jnp.ones(3)}, optimizer, train.ema_decay)
  return start, jax.jit(step.make_train_step(scaled, optimizer, train))


@pytest.mark.parametrize('bad', [np.nan, np.inf, 100.0], ids=str)
def test_an_update_out_of_range_is_left_out_and_counted(bad):
  now, take = stepper(dataclasses.replace(TRAIN, max_norm_ratio=30, ema_decay=0.9))
  for _ in range(100):
    now, values = take(now, jnp.ones(3))
  before = now
  for count in (1, 2):
    now, values = take(now, jnp.array([1.0, bad, 1.0]))
    assert int(values['skipped_updates']) == int(values['skipped_in_a_row']) == count
  assert int(now.step) == 102
  for name in ('params', 'opt_state', 'average'):
    for old, new in zip(*(jax.tree.leaves(getattr(s, name)) for s in (before, now)), strict=True):
      np.testing.assert_array_equal(old, new)
  now, values = take(now, jnp.ones(3))
  assert int(values['skipped_updates']) == 2 and int(values['skipped_in_a_row']) == 0
  assert not np.array_equal(now.params['kernel'], before.params['kernel'])


def test_the_range_follows_the_gradients_and_can_be_turned_off():
  """A norm that grows by 2 % each step is never out of range; nor is anything without one, nor
  before there is one."""
  now, take = stepper(TRAIN)
  mean = 0.0
  for k in range(300):
    now, values = take(now, 1.02**k * jnp.ones(3))
    mean += (math.log(math.sqrt(3) * 1.02**k) - mean) / min(k + 1, 100)
  assert int(values['skipped_updates']) == 0
  np.testing.assert_allclose(now.health.log_norm, mean, rtol=1e-4)
  for settings, steps in ((dataclasses.replace(TRAIN, max_norm_ratio=0), 110), (TRAIN, 90)):
    now, take = stepper(settings)
    for _ in range(steps):
      now, values = take(now, jnp.ones(3))
    now, values = take(now, 1e6 * jnp.ones(3))
    assert int(values['skipped_updates']) == 0


def poison(monkeypatch, poisoned):
  """Makes the loss of batches nan for which poisoned(order, batches taken) is true."""
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


def test_a_bad_stretch_of_data_is_gone_round(monkeypatch, tmp_path, capsys):
  """Steps 6 to 9 are unusable in the first order: back to step 4, and on in another."""
  poison(monkeypatch, lambda order, batches: order == 0 and 6 <= batches < 10)
  pretrain.run(CONFIG, tmp_path / 'run')
  said = capsys.readouterr().err
  assert '2 updates in a row were unusable' in said
  assert 'Going on from step 4, the data in another order (1)' in said
  records = [r for r in metrics.read(tmp_path / 'run') if r['split'] == 'train']
  assert [r['step'] for r in records] == list(range(1, 13))
  assert [r.get('data_order', 0) for r in records] == [0] * 4 + [1] * 8
  assert all(np.isfinite(r['loss']) and r['skipped_updates'] == 0 for r in records)
  (file,) = (tmp_path / 'run' / 'divergence').iterdir()
  found = json.loads(file.read_text())
  assert found['returns'] == 1 and len(found['log_det_blocks']) == 2
  assert np.shape(found['flow_log_scale']) == (2, 2)
  assert found['informative_log_scale'][0] < found['informative_log_scale'][1]


def test_one_bad_batch_does_not_matter(monkeypatch, tmp_path, capsys):
  poison(monkeypatch, lambda order, batches: batches == 6)
  pretrain.run(CONFIG, tmp_path / 'run')
  assert 'unusable' not in capsys.readouterr().err
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
  assert [r['skipped_updates'] for r in records if r['split'] == 'train'] == [0] * 5 + [1] * 7
  assert records[5]['loss'] is None and records[6]['loss'] is not None
  rates = [r['learning_rate'] for r in records if r['split'] == 'train']
  assert rates[5] == rates[4]  # that of the last update that was made


def test_training_that_diverges_for_good_ends_with_a_diagnosis(tmp_path):
  """A learning rate of a thousand, for real."""
  optimizer = config_lib.Optimizer(learning_rate=1e3, warmup_steps=0)
  train = dataclasses.replace(TRAIN, steps=60, max_returns=1, checkpoint_every=0)
  train = dataclasses.replace(train, optimizer=optimizer)
  with pytest.raises(errors.ConfigError) as raised:
    pretrain.run(dataclasses.replace(CONFIG, train=train), tmp_path / 'run')
  message = str(raised.value)
  assert message.startswith('training diverges: step ') and '\n' not in message
  assert 'after going back 1 times' in message and 'learning_rate' in message
  assert 'largest log-det in flow block' in message and 'mixture scales from' in message
  assert len(list((tmp_path / 'run' / 'divergence').iterdir())) >= 1


def test_a_log_det_that_departs_is_named(tmp_path, capsys):
  watch = divergence.Watch(TRAIN, tmp_path)
  rng = np.random.default_rng(0)
  for k in range(60):
    watch.look_at(k, {'log_det_block_0': rng.normal(), 'log_det_block_1': 2 + k / 20, 'loss': k})
  assert not capsys.readouterr().err
  watch.look_at(60, {'log_det_block_0': 0.1, 'log_det_block_1': -80.0, 'loss': 60})
  watch.look_at(61, {'log_det_block_0': float('nan'), 'log_det_block_1': -80.0, 'loss': 60})
  first, second = capsys.readouterr().err.splitlines()
  assert 'step 60' in first and 'in flow blocks 1 (-80,' in first
  assert 'step 61' in second and 'in flow blocks 0 (nan,' in second
