"""Scales of parameters: at all widths, updates change the outputs equally."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from farmer_jax import config as config_lib
from farmer_jax import losses
from farmer_jax.nn import farmer, scaling
from farmer_jax.training import optimizer as optimizer_lib
from tests.support import runs

STEPS = 1, 3, 10


def make_config(width, kind, **optimizer):
  model = runs.CONFIG.model
  stack = dict(width=width, head_dim=16, layers=2)
  return dataclasses.replace(
    runs.CONFIG,
    model=dataclasses.replace(
      model,
      flow=dataclasses.replace(model.flow, **stack),
      prior=dataclasses.replace(model.prior, **stack),
    ),
    train=config_lib.Train(
      steps=100,
      optimizer=config_lib.Optimizer(
        kind=kind, learning_rate=3e-3, warmup_steps=0, clip_norm=0, **optimizer
      ),
    ),
  )


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


def changes(config, seed=0):
  """Returns the root mean square change of each output after each number of steps in STEPS."""
  model, optimizer = farmer.build(config), optimizer_lib.create(config)
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 17, (16, 8, 8, 1)) * 15  # Random images: no width can predict them.
  batch = {'image': jnp.asarray(images, jnp.uint8), 'label': jnp.arange(16) % 10}
  values, labels = jnp.asarray(images / 127.5 - 1), batch['label']
  params = jax.jit(functools.partial(farmer.init_params, model=model))(jax.random.key(seed))
  loss = functools.partial(losses.nll_loss, model=model, config=config)
  evaluate = jax.jit(functools.partial(outputs, model))

  @jax.jit
  def update(params, state, step):
    (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, step, 0)
    updates, state = optimizer.update(gradients, state, params, loss=value)
    return optax.apply_updates(params, updates), state

  first, state, found = evaluate(params, values, labels), optimizer.init(params), {}
  for step in range(max(STEPS)):
    params, state = update(params, state, step)
    if step + 1 in STEPS:
      now = evaluate(params, values, labels)
      found[step + 1] = {
        name: float(jnp.sqrt(jnp.mean((now[name] - first[name]) ** 2))) for name in first
      }
  return found


def spread(found):
  """Returns the largest change over all widths divided by the smallest, per step and output."""
  return {
    (step, name): max(f[step][name] for f in found) / min(f[step][name] for f in found)
    for step in STEPS
    for name in found[0][step]
  }


@pytest.mark.parametrize(
  'widths, seeds', [((64, 512), 1), pytest.param((64, 128, 256, 512), 3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_updates_change_outputs_equally_at_all_widths(kind, widths, seeds):
  """The coordinate check of the maximal-update parametrization (arXiv 2203.03466)."""

  def mean_changes(config):
    found = [changes(config, seed) for seed in range(seeds)]
    return jax.tree.map(lambda *values: float(np.mean(values)), *found)

  found = spread([mean_changes(make_config(width, kind)) for width in widths])
  assert max(found.values()) < 2, max(found, key=found.get)


def test_outputs_depend_on_the_width_without_factors(monkeypatch):
  monkeypatch.setattr(
    scaling, 'learning_rate_factors', lambda params, _: jax.tree.map(lambda a: 1.0, params)
  )
  found = spread([changes(make_config(width, 'adamw')) for width in (64, 256)])
  assert max(found.values()) > 2


def test_factors_of_all_kinds():
  config = make_config(256, 'adamw')
  model = dataclasses.replace(
    config.model, prior=dataclasses.replace(config.model.prior, width=512)
  )
  config = dataclasses.replace(config, model=model)
  params = jax.eval_shape(
    functools.partial(farmer.init_params, model=farmer.build(config)), jax.random.key(0)
  )
  factors = scaling.learning_rate_factors(params, config)
  flow, prior = factors['flow']['stack'], factors['prior']
  assert flow['in_proj'] == {'kernel': 1.0, 'bias': 1.0} and flow['positions'] == 1.0
  assert flow['shift_proj'] == flow['log_scale_proj'] == {'kernel': 0.5, 'bias': 1.0}
  assert prior['informative_head']['means'] == {'kernel': 0.25, 'bias': 1.0}
  layer = flow['transformer']['stack']
  assert layer['query']['kernel'] == layer['mlp_out']['kernel'] == 0.5
  assert layer['mlp_norm']['scale'] == 1.0


def test_table_counts_every_parameter():
  config = make_config(64, 'muon')
  params = farmer.init_params(jax.random.key(0), farmer.build(config))
  header, *rows = scaling.table(params, config).splitlines()
  start = header.index('number')
  numbers = [int(row[start:].split()[0].replace(',', '')) for row in rows]
  assert sum(numbers) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_muon_orthogonalizes_matrices_of_layers_only():
  """One update with the gradient G = U S V' is -rate · factor · U V', up to Muon's tolerance."""
  config = make_config(128, 'muon', weight_decay=0.0)
  model, optimizer = farmer.build(config), optimizer_lib.create(config)
  params = farmer.init_params(jax.random.key(0), model)
  rng = np.random.default_rng(0)
  gradients = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), params)
  state, apply_optimizer = optimizer.init(params), jax.jit(optimizer.update)
  updates, _ = apply_optimizer(gradients, state, params, loss=jnp.zeros(()))
  factors = scaling.learning_rate_factors(params, config)
  for path in ('query', 'mlp_in', 'mlp_out'):

    def pick(tree, path=path):
      return tree['flow']['stack']['transformer']['stack'][path]['kernel']

    update = np.asarray(pick(updates))[1, 0] / (3e-3 * pick(factors))
    u, _, v = np.linalg.svd(np.asarray(pick(gradients))[1, 0], full_matrices=False)
    singular = np.linalg.svd(update, compute_uv=False)
    # Muon's iteration does not raise the smallest singular values of a square random matrix to 1.
    assert np.quantile(singular, 0.05) > 0.6 and singular.max() < 1.3
    cosine = -(update * (u @ v)).sum() / np.linalg.norm(update) / np.linalg.norm(u @ v)
    assert cosine > 0.97
  # The first update of Adam has the sign of the gradient.
  update = updates['prior']['in_proj']['kernel'] / 3e-3
  np.testing.assert_allclose(update, -np.sign(gradients['prior']['in_proj']['kernel']), rtol=1e-3)


def test_adamw_equals_optax_at_the_base_width():
  config = make_config(scaling.BASE_WIDTH, 'adamw')
  params = farmer.init_params(jax.random.key(0), farmer.build(config))
  ours, schedule = optimizer_lib.create(config), optimizer_lib.learning_rate_schedule(config.train)
  decay = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)
  theirs = optax.adamw(schedule, 0.9, 0.95, weight_decay=0.03, mask=decay)
  states, rng = [ours.init(params), theirs.init(params)], np.random.default_rng(0)
  for _ in range(3):
    gradients = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), params)
    found, states[0] = ours.update(gradients, states[0], params, loss=jnp.zeros(()))
    expected, states[1] = theirs.update(gradients, states[1], params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5)
    params = optax.apply_updates(params, found)
