"""Scales of parameters: at all widths, updates change the outputs equally."""

import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from farmer_jax import config as config_lib
from farmer_jax import losses
from farmer_jax.nn import farmer, scaling, student
from farmer_jax.training import optimizer as optimizer_lib
from tests.support import models, runs

KEY, STEPS = jax.random.key(0), (1, 3, 10)


def make_config(width, kind, **changes):
  stack = dict(width=width, head_dim=16, layers=2)
  optimizer = dict(kind=kind, learning_rate=3e-3, warmup_steps=0, clip_norm=0) | changes
  train = config_lib.Train(steps=100, optimizer=config_lib.Optimizer(**optimizer))
  # Loops over layers and blocks compile faster than unrolled layers.
  model = dict(flow=stack, prior=stack, scan_unroll=1)
  return models.replace(runs.CONFIG, model=model, train=train)


def outputs(model, params, images, labels):
  """Returns the outputs of both flow blocks and of the prior."""
  model = model.bind({'params': params})
  z, found = model.images_to_tokens(images), {}
  for block in range(model.config.flow.blocks):
    bound = model.flow.bind_block(jax.tree.map(lambda a, t=block: a[t], model.flow.block_params))
    shift, log_scale, hidden = bound.affine_parameters(z, None)
    found |= {f'shift {block}': shift, f'log_scale {block}': log_scale, f'hidden {block}': hidden}
    z, _ = bound(z, None)
  mixtures = model.prior.mixtures(z[..., : model.prior.informative_channels], labels)
  for name, mixture in zip(('informative', 'redundant'), mixtures, strict=True):
    logits = mixture.logits - mixture.logits.mean(-1, keepdims=True)  # Only differences matter.
    parts = {'logits': logits, 'means': mixture.means, 'log_scales': mixture.log_scales}
    found |= {f'{name} {part}': value for part, value in parts.items()}
  return found


@functools.cache
def model_programs(width):
  """Returns compiled functions: initial parameters, and outputs."""
  model = farmer.build(make_config(width, 'adamw'))
  init = functools.partial(farmer.init_params, model=model)
  return jax.jit(init), jax.jit(functools.partial(outputs, model))


@functools.cache
def optimizer_programs(width, kind):
  """Returns compiled functions: initial state, and update."""
  config = make_config(width, kind)
  model, optimizer = farmer.build(config), optimizer_lib.create(config)
  loss = functools.partial(losses.nll_loss, model=model, config=config)
  factors = scaling.learning_rate_factors

  def update(params, state, batch, step, exponent):
    (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, step, 0)
    with mock.patch.object(
      scaling,
      'learning_rate_factors',
      lambda *args: jax.tree.map(lambda factor: factor**exponent, factors(*args)),
    ):
      updates, state = optimizer.update(gradients, state, params, loss=value)
    return optax.apply_updates(params, updates), state

  return jax.jit(optimizer.init), jax.jit(update)


def changes(width, kind, seed=0, exponent=1.0):
  """Returns the root mean square change of each output after each number of steps in STEPS.

  The learning rates have the factors of `scaling` to the power of `exponent`.
  """
  init, evaluate = model_programs(width)
  init_state, update = optimizer_programs(width, kind)
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 17, (16, 8, 8, 1)) * 15  # Random images: no width can predict them.
  batch = {'image': jnp.asarray(images, jnp.uint8), 'label': jnp.arange(16) % 10}
  params = init(jax.random.key(seed))
  state = init_state(params)
  evaluated, found = [jnp.asarray(images / 127.5 - 1), batch['label']], {}
  first = evaluate(params, *evaluated)
  for step in range(max(STEPS)):
    params, state = update(params, state, batch, step, exponent)
    if step + 1 in STEPS:
      for name, now in evaluate(params, *evaluated).items():
        found[step + 1, name] = float(jnp.sqrt(jnp.mean((now - first[name]) ** 2)))
  return found


def spread(found):
  """Returns the largest change over all widths divided by the smallest, per step and output."""
  return jax.tree.map(lambda *values: max(values) / min(values), *found)


@pytest.mark.parametrize(
  'widths, seeds', [((64, 256), 1), pytest.param((64, 128, 256, 512), 3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_updates_change_outputs_equally_at_all_widths(kind, widths, seeds):
  """The coordinate check of the maximal-update parametrization (arXiv 2203.03466)."""

  def mean_changes(width):
    found = [changes(width, kind, seed) for seed in range(seeds)]
    return jax.tree.map(lambda *values: float(np.mean(values)), *found)

  found = spread(list(map(mean_changes, widths)))
  assert max(found.values()) < 2, max(found, key=found.get)


def test_outputs_depend_on_the_width_without_factors():
  found = spread([changes(width, 'adamw', exponent=0.0) for width in (64, 256)])
  assert max(found.values()) > 2


def test_factors_of_all_kinds():
  config = models.replace(make_config(256, 'adamw'), model=dict(prior=dict(width=512)))
  params = jax.eval_shape(lambda key: farmer.init_params(key, farmer.build(config)), KEY)
  factors = scaling.learning_rate_factors(params, config)
  flow, prior = factors['flow']['stack'], factors['prior']
  assert flow['in_proj'] == {'kernel': 1.0, 'bias': 1.0} and flow['positions'] == 1.0
  assert flow['shift_proj'] == flow['log_scale_proj'] == {'kernel': 0.5, 'bias': 1.0}
  assert prior['informative_head']['means'] == {'kernel': 0.25, 'bias': 1.0}
  layer = flow['transformer']['stack']
  assert layer['query']['kernel'] == layer['mlp_out']['kernel'] == 0.5
  assert layer['mlp_norm']['scale'] == 1.0


def test_coupling_flows_have_the_parameters_and_factors_of_autoregressive_flows():
  factors = []
  for kind in ('autoregressive', 'coupling'):
    config = models.replace(make_config(256, 'adamw'), model=dict(flow=dict(kind=kind)))
    params = jax.eval_shape(lambda key, c=config: farmer.init_params(key, farmer.build(c)), KEY)
    factors.append(scaling.learning_rate_factors(params, config))
  assert factors[0] == factors[1]
  assert params['flow']['stack']['log_scale_proj']['kernel'].shape == (2, 256, 2)


def test_factors_of_a_student_are_those_of_its_own_width():
  settings = dict(width=64, all_tokens=True, objective='hidden')
  config = models.replace(make_config(256, 'adamw'), distill=settings)
  model = student.build(config)
  teacher = jax.eval_shape(lambda key: farmer.init_params(key, model), KEY)
  init = functools.partial(losses.init_student, model=model)
  factors = scaling.learning_rate_factors(nn.unbox(jax.eval_shape(init, KEY, teacher)), config)
  stack = factors['student']['stack']
  assert stack['shift_proj']['kernel'] == factors['alignment']['kernel'] == 2.0
  assert stack['first_token_gain'] == stack['positions'] == 1.0


@pytest.fixture(scope='module')
def params():
  return model_programs(scaling.BASE_WIDTH)[0](KEY)


def random_gradients(params, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), params)


def test_table_counts_every_parameter(params):
  header, *rows = scaling.table(params, make_config(scaling.BASE_WIDTH, 'muon')).splitlines()
  start = header.index('number')
  numbers = [int(row[start:].split()[0].replace(',', '')) for row in rows]
  assert sum(numbers) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_muon_orthogonalizes_matrices_of_layers_only(params):
  """One update with the gradient G = U S V' is -rate · factor · U V', up to Muon's tolerance."""
  config = make_config(scaling.BASE_WIDTH, 'muon', weight_decay=0.0)
  optimizer, gradients, loss = optimizer_lib.create(config), random_gradients(params), jnp.zeros(())
  updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params, loss=loss)
  factors = scaling.learning_rate_factors(params, config)
  for path in ('query', 'mlp_in', 'mlp_out'):
    update, gradient, factor = (
      np.asarray(tree['flow']['stack']['transformer']['stack'][path]['kernel'])
      for tree in (updates, gradients, factors)
    )
    update = update[1, 0] / (3e-3 * factor)
    u, _, v = np.linalg.svd(gradient[1, 0], full_matrices=False)
    singular = np.linalg.svd(update, compute_uv=False)
    # Muon's iteration does not raise the smallest singular values of a square random matrix to 1.
    assert np.quantile(singular, 0.05) > 0.6 and singular.max() < 1.3
    cosine = -(update * (u @ v)).sum() / np.linalg.norm(update) / np.linalg.norm(u @ v)
    assert cosine > 0.97
  # The first update of Adam has the sign of the gradient.
  update = updates['prior']['in_proj']['kernel'] / 3e-3
  np.testing.assert_allclose(update, -np.sign(gradients['prior']['in_proj']['kernel']), rtol=1e-3)


def test_adamw_equals_optax_at_the_base_width(params):
  """In float64, because a few updates are differences of nearly equal numbers."""
  config = make_config(scaling.BASE_WIDTH, 'adamw')
  ours, schedule = optimizer_lib.create(config), optimizer_lib.learning_rate_schedule(config.train)
  decay = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)
  theirs = optax.adamw(schedule, 0.9, 0.95, weight_decay=0.03, mask=decay)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    states = [ours.init(params), theirs.init(params)]
    update_ours, update_theirs = jax.jit(ours.update), jax.jit(theirs.update)
    for seed in range(3):
      gradient = random_gradients(params, seed)
      found, states[0] = update_ours(gradient, states[0], params, loss=jnp.zeros(()))
      expected, states[1] = update_theirs(gradient, states[1], params)
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)
      params = optax.apply_updates(params, found)
