"""Comparison of the training step with explicit formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from farmer_jax import config
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import step as step_lib
from tests.support.models import replace

# The parameters of these tests are vectors, which Muon does not accept.
TRAIN = config.Train(steps=100, batch_size=8, optimizer=config.Optimizer(kind='adamw'))


def quadratic(params, batch, step, part):
  """A loss without randomness. Its mean over the parts of a batch is the loss of the full batch."""
  del step, part
  loss = ((batch['image'] @ params['kernel'] - batch['label']) ** 2).mean()
  return loss, {'loss': loss}


@pytest.fixture(name='batch')
def _batch():
  rng = np.random.default_rng(0)
  return {'image': rng.normal(size=(8, 3)), 'label': rng.normal(size=8)}


def start(loss, train, optimizer=None):
  """Returns the initial state, with three parameters, and the compiled training step."""
  optimizer = optimizer or optimizer_lib.create(config.Config(train=train))
  init = step_lib.initializer(lambda key: {'kernel': jnp.ones(3)}, optimizer, train.ema_decay)
  return init(jax.random.key(0)), jax.jit(step_lib.make_train_step(loss, optimizer, train))


def run(train, batch, steps=1):
  state, step = start(quadratic, train)
  history = [state]
  for _ in range(steps):
    state, metrics = step(state, batch)
    history.append(state)
  return history, metrics


def test_accumulated_parts_equal_the_full_batch(batch):
  full, metrics = run(TRAIN, batch)
  parts, metrics_of_parts = run(replace(TRAIN, accumulation_steps=4), batch)
  np.testing.assert_allclose(full[-1].params['kernel'], parts[-1].params['kernel'], rtol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(value, metrics_of_parts[name], rtol=1e-6)


def test_accumulated_parts_have_different_random_keys(batch):
  seen = []

  def noisy(params, batch, step, part):
    noise = jax.random.uniform(jax.random.fold_in(jax.random.key(0), part))
    jax.debug.callback(lambda n: seen.append(float(n)), noise)
    return quadratic(params, batch, step, part)

  state, step = start(noisy, replace(TRAIN, accumulation_steps=4))
  jax.block_until_ready(step(state, batch))
  jax.effects_barrier()
  assert len(set(seen)) == 4


def test_ema_follows_its_recurrence(batch):
  decay = 0.7
  history, _ = run(replace(TRAIN, ema_decay=decay), batch, steps=3)
  expected = history[0].params['kernel']
  for state in history[1:]:
    expected = decay * expected + (1 - decay) * state.params['kernel']
  np.testing.assert_allclose(history[-1].ema_params['kernel'], expected, rtol=1e-6)
  assert history[-1].evaluation_params is history[-1].ema_params
  assert run(TRAIN, batch)[0][-1].ema_params is None


def test_gradients_are_clipped_but_the_unclipped_norm_is_reported(batch):
  gradient = jax.grad(lambda p: quadratic(p, batch, 0, 0)[0])({'kernel': jnp.ones(3)})
  history, metrics = run(replace(TRAIN, optimizer=dict(clip_norm=1e-3)), batch)
  np.testing.assert_allclose(metrics['grad_norm'], optax.global_norm(gradient), rtol=1e-6)
  moment = optax.tree.get(history[-1].opt_state, 'mu')['kernel']
  np.testing.assert_allclose(jnp.linalg.norm(moment), 0.1 * 1e-3, rtol=1e-4)


def test_only_kernels_decay():
  train = replace(TRAIN, optimizer=dict(weight_decay=0.5, warmup_steps=1))
  params = {
    'layer': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
    'norm': {'scale': jnp.ones(2)},
    'positions': jnp.ones((3, 2)),
    'classes': {'embedding': jnp.ones((3, 2))},
  }
  optimizer = optimizer_lib.create(config.Config(train=train))
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params, loss=jnp.zeros(()))
  changed = [
    jax.tree_util.keystr(path)
    for path, update in jax.tree_util.tree_leaves_with_path(updates)
    if (update != 0).any()
  ]
  assert changed == ["['layer']['kernel']"]


def test_learning_rate_warms_up_and_follows_the_cosine():
  o = TRAIN.optimizer
  rate = optimizer_lib.learning_rate_schedule(TRAIN)
  warmup, steps = o.warmup_steps, TRAIN.steps
  assert rate(0) > 0
  np.testing.assert_allclose(rate(warmup), o.learning_rate, rtol=1e-6)
  middle = (warmup + steps) // 2
  cosine = 0.5 * (1 + np.cos(np.pi * (middle - warmup) / (steps - 1 - warmup)))
  expected = o.final_learning_rate + (o.learning_rate - o.final_learning_rate) * cosine
  np.testing.assert_allclose(rate(middle), expected, rtol=1e-5)
  np.testing.assert_allclose(rate(steps - 1), o.final_learning_rate, rtol=1e-4)


def linear(params, batch, step, part):
  """A loss whose gradient is the batch."""
  del step, part
  loss = (params['kernel'] * batch).sum()
  return loss, {'loss': loss}


def start_skipping(train):
  optimizer = optimizer_lib.skip_bad_updates(optax.adam(0.1), train.max_grad_norm_ratio)
  return start(linear, train, optimizer)


@pytest.mark.parametrize('bad', [np.nan, np.inf, 100.0], ids=str)
def test_bad_update_is_skipped_and_counted(bad):
  train = replace(TRAIN, max_grad_norm_ratio=30, ema_decay=0.9)
  state, step = start_skipping(train)
  for _ in range(100):
    state, metrics = step(state, jnp.ones(3))
  before = state
  for count in (1, 2):
    state, metrics = step(state, jnp.array([1.0, bad, 1.0]))
    assert int(metrics['skipped_updates']) == int(metrics['consecutive_skips']) == count
  assert int(state.step) == 102
  for get in (lambda s: s.params, lambda s: s.opt_state.inner, lambda s: s.ema_params):
    jax.tree.map(np.testing.assert_array_equal, get(before), get(state))
  state, metrics = step(state, jnp.ones(3))
  assert int(metrics['skipped_updates']) == 2 and int(metrics['consecutive_skips']) == 0
  assert not np.array_equal(state.params['kernel'], before.params['kernel'])


def test_loss_that_is_not_finite_skips_the_update():
  def infinite(params, batch, step, part):
    loss, metrics = linear(params, batch, step, part)
    return loss + jnp.inf, metrics

  optimizer = optimizer_lib.skip_bad_updates(optax.adam(0.1), 0)
  state, step = start(infinite, TRAIN, optimizer)
  assert int(step(state, jnp.ones(3))[1]['skipped_updates']) == 1


def test_growing_gradient_norm_skips_no_update():
  """The norm grows 30 times in 50 steps. The running mean equals its explicit recurrence."""
  state, step = start_skipping(TRAIN)
  mean = 0.0
  for k in range(300):
    state, metrics = step(state, 1.07**k * jnp.ones(3))
    mean += (math.log(math.sqrt(3) * 1.07**k) - mean) / min(k + 1, 20)
  assert int(metrics['skipped_updates']) == 0
  np.testing.assert_allclose(state.opt_state.log_norm, mean, rtol=1e-4)


@pytest.mark.parametrize('ratio, steps', [(0, 110), (TRAIN.max_grad_norm_ratio, 90)])
def test_norm_is_not_checked_without_a_ratio_nor_before_100_updates(ratio, steps):
  state, step = start_skipping(replace(TRAIN, max_grad_norm_ratio=ratio))
  for _ in range(steps):
    state, _ = step(state, jnp.ones(3))
  assert int(step(state, 1e6 * jnp.ones(3))[1]['skipped_updates']) == 0


def test_xla_flags_of_the_user_take_precedence(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')
  assert step_lib.compiler_options('gpu') == {'xla_gpu_enable_latency_hiding_scheduler': True}
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_enable_latency_hiding_scheduler=false')
  assert step_lib.compiler_options('gpu') == {}
