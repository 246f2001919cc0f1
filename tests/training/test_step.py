"""The optimizer step against hand-written arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from farmer_jax import config
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import state as state_lib
from farmer_jax.training import step as step_lib

TRAIN = config.Train(steps=100, batch_size=8)


def quadratic(params, batch, step, part):
  """A loss without randomness, so that parts of a batch add up to the whole."""
  del step, part
  loss = ((batch['image'] @ params['kernel'] - batch['label']) ** 2).mean()
  return loss, {'loss': loss}


@pytest.fixture(name='batch')
def _batch():
  rng = np.random.default_rng(0)
  return {'image': rng.normal(size=(8, 3)), 'label': rng.normal(size=8)}


def run(train, batch, steps=1):
  optimizer = optimizer_lib.create(train)
  state = state_lib.create({'kernel': jnp.ones(3)}, optimizer, train.ema_decay)
  step = jax.jit(step_lib.make_train_step(quadratic, optimizer, train))
  history = [state]
  for _ in range(steps):
    state, metrics = step(state, batch)
    history.append(state)
  return history, metrics


def test_accumulation_equals_the_whole_batch(batch):
  whole, metrics = run(TRAIN, batch)
  parts, metrics_of_parts = run(dataclasses.replace(TRAIN, accumulate=4), batch)
  np.testing.assert_allclose(whole[-1].params['kernel'], parts[-1].params['kernel'], rtol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(value, metrics_of_parts[name], rtol=1e-6)


def test_each_accumulated_part_gets_its_own_randomness(batch):
  seen = []

  def noisy(params, batch, step, part):
    noise = jax.random.uniform(jax.random.fold_in(jax.random.key(0), part))
    jax.debug.callback(lambda n: seen.append(float(n)), noise)
    return quadratic(params, batch, step, part)

  train = dataclasses.replace(TRAIN, accumulate=4)
  optimizer = optimizer_lib.create(train)
  state = state_lib.create({'kernel': jnp.ones(3)}, optimizer, 0.0)
  jax.block_until_ready(jax.jit(step_lib.make_train_step(noisy, optimizer, train))(state, batch))
  jax.effects_barrier()
  assert len(set(seen)) == 4


def test_average_follows_its_recurrence(batch):
  decay = 0.7
  history, _ = run(dataclasses.replace(TRAIN, ema_decay=decay), batch, steps=3)
  expected = history[0].params['kernel']
  for state in history[1:]:
    expected = decay * expected + (1 - decay) * state.params['kernel']
  np.testing.assert_allclose(history[-1].average['kernel'], expected, rtol=1e-6)
  assert history[-1].best_params is history[-1].average
  assert run(TRAIN, batch)[0][-1].average is None


def test_gradients_are_clipped_but_reported_whole(batch):
  optimizer = dataclasses.replace(TRAIN.optimizer, clip_norm=1e-3)
  gradient = jax.grad(lambda p: quadratic(p, batch, 0, 0)[0])({'kernel': jnp.ones(3)})
  history, metrics = run(dataclasses.replace(TRAIN, optimizer=optimizer), batch)
  np.testing.assert_allclose(metrics['grad_norm'], optax.global_norm(gradient), rtol=1e-6)
  moment = next(
    s.mu['kernel']
    for s in jax.tree.leaves(history[-1].opt_state, is_leaf=lambda s: hasattr(s, 'mu'))
    if hasattr(s, 'mu')
  )
  np.testing.assert_allclose(jnp.linalg.norm(moment), 0.1 * 1e-3, rtol=1e-4)


def test_weight_decay_spares_all_but_kernels():
  train = dataclasses.replace(
    TRAIN, optimizer=dataclasses.replace(TRAIN.optimizer, weight_decay=0.5, warmup_steps=1)
  )
  params = {
    'layer': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
    'norm': {'scale': jnp.ones(2)},
    'positions': jnp.ones((3, 2)),
    'classes': {'embedding': jnp.ones((3, 2))},
  }
  optimizer = optimizer_lib.create(train)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  touched = {
    jax.tree_util.keystr(path): bool((update != 0).any())
    for path, update in jax.tree_util.tree_leaves_with_path(updates)
  }
  assert [name for name, moved in touched.items() if moved] == ["['layer']['kernel']"]


def test_learning_rate_warms_up_and_follows_the_cosine():
  o = TRAIN.optimizer
  rate = optimizer_lib.learning_rate_schedule(TRAIN)
  warmup, steps = o.warmup_steps, TRAIN.steps
  assert rate(0) > 0
  np.testing.assert_allclose(rate(warmup), o.learning_rate, rtol=1e-6)
  middle = (warmup + steps) // 2
  cosine = 0.5 * (1 + np.cos(np.pi * (middle - warmup) / (steps - warmup)))
  expected = o.final_learning_rate + (o.learning_rate - o.final_learning_rate) * cosine
  np.testing.assert_allclose(rate(middle), expected, rtol=1e-5)
  np.testing.assert_allclose(rate(steps), o.final_learning_rate, rtol=1e-4)


def test_noise_anneals_along_half_a_cosine():
  noise = config.Noise(kind='gaussian', std_start=0.1, std_end=0.005)
  std = optimizer_lib.noise_std_schedule(noise, 101)
  np.testing.assert_allclose([std(0), std(50), std(100)], [0.1, 0.0525, 0.005], rtol=1e-6)
  np.testing.assert_allclose(std(25), 0.005 + 0.095 * 0.5 * (1 + np.cos(np.pi / 4)), rtol=1e-6)
