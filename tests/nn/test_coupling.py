"""The flow of affine couplings: exact inverse, log-determinants, a reference, and its splits."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from farmer_jax.nn import coupling, farmer
from tests.support import models as tiny

pytestmark = pytest.mark.usefixtures('x64')

N = 4
LABELS = jnp.asarray([0, 1, 3], jnp.int32)  # 3: no class

FLOWS = {
  'odd': dict(channels=3, blocks=2, layers=2, unroll=8, remat='dots'),
  'even': dict(channels=4, blocks=3, num_classes=3, max_log_scale=0.2, remat='full'),
  'two channels': dict(channels=2, blocks=2),
}


def jacobian_of(apply, mode=jax.jacfwd):
  """Returns Jacobians [B, N, d, N, d] of the first output of `apply(x, labels)`, per example."""

  def one(x, label):
    return mode(lambda x: apply(x[None], label[None])[0][0])(x)

  return jax.jit(jax.vmap(one))


@pytest.fixture(scope='module', params=FLOWS)
def flow(request, x64):
  """A flow, and its outputs for an input."""
  settings = FLOWS[request.param]
  module = tiny.make_flow(N, flow_class=coupling.CouplingFlow, **settings)
  x = tiny.normals(3, N, settings['channels'])
  model = tiny.Compiled(module, x, LABELS)
  z, log_dets = model()(x, LABELS)
  jacobian = np.asarray(jacobian_of(model.apply)(x, LABELS))
  return types.SimpleNamespace(model=model, x=x, z=z, log_dets=log_dets, jacobian=jacobian)


def test_inverse_is_exact_and_takes_one_pass(flow):
  assert abs(flow.z - flow.x).max() > 0.5
  x, convergence = flow.model('inverse')(flow.z, LABELS)
  np.testing.assert_allclose(x, flow.x, atol=1e-12)
  z, _ = flow.model()(flow.model('inverse')(flow.x, LABELS)[0], LABELS)
  np.testing.assert_allclose(z, flow.x, atol=1e-12)
  assert convergence.residual.shape == (flow.model.module.flow.blocks, 3)
  assert (convergence.residual == 0).all() and (convergence.passes == 1).all()
  # Chunk sizes have no effect.
  chunk_sizes = (2, 1, 7)[: flow.model.module.flow.blocks]
  chunked = flow.model.apply(flow.z, LABELS, chunk_sizes, 1.0, method='inverse')[0]
  np.testing.assert_allclose(chunked, flow.x, atol=1e-12)


def test_log_det_and_reverse_mode_equal_the_jacobian(flow):
  """Reverse mode covers rematerialization."""
  dims = flow.x[0].size
  expected = np.linalg.slogdet(flow.jacobian.reshape(-1, dims, dims))[1]
  assert abs(expected).min() > 0.01
  np.testing.assert_allclose(flow.log_dets.sum(0), expected, atol=1e-10)
  jacobian = jacobian_of(flow.model.apply, jax.jacrev)(flow.x, LABELS)
  np.testing.assert_allclose(jacobian, flow.jacobian, atol=1e-11)


@pytest.mark.parametrize('channels', [2, 3, 4, 7])
def test_block_transforms_one_half_given_the_other_half(channels):
  """Derivatives by values of the transformed half are 0, except those of a value by itself."""
  x, read = tiny.normals(2, N, channels), channels - channels // 2
  block = tiny.Compiled(tiny.make_block(N, channels, coupling.CouplingBlock, blocks=3), x, None)
  z, _ = block()(x, None)
  jacobian = jacobian_of(lambda x, _: block.apply(x, None))(x, LABELS[:2])
  order = np.argsort(coupling.channel_permutation(channels, 3))
  z, jacobian = np.asarray(z)[..., order], np.asarray(jacobian)[:, :, order]
  np.testing.assert_array_equal(z[..., :read], x[..., :read])
  identity = np.eye(N * channels).reshape(N, channels, N, channels)
  np.testing.assert_array_equal(jacobian[:, :, :read], np.stack([identity[:, :read]] * 2))
  assert (abs(jacobian[:, :, read:, :, :read]) > 1e-7).all()  # all tokens, also later ones
  own = jacobian[:, :, read:, :, read:]
  assert ((own != 0) == (identity[:, read:, :, read:] != 0)).all() and (own >= 0).all()
  assert (abs(np.log(own[own != 0])) > 1e-6).all()


def test_new_flow_is_the_identity():
  x = tiny.normals(3, N, 5)
  module = tiny.make_flow(N, 5, flow_class=coupling.CouplingFlow)
  z, log_dets = module.init_with_output(jax.random.key(0), x, LABELS)[0]
  np.testing.assert_array_equal(z, x)
  assert log_dets.shape == (3, 3) and (log_dets == 0).all()


def halves(channels, blocks):
  """Returns whether each block transforms each channel of x, [blocks, d]."""
  position, found = np.arange(channels), []
  target = np.argsort(coupling.channel_permutation(channels, blocks))  # position -> next position
  for _ in range(blocks):
    found.append(position >= channels - channels // 2)
    position = target[position]
  return np.array(found)


@pytest.mark.parametrize('channels', [2, 3, 4, 7, 16, 48, 192, 768])
def test_three_successive_blocks_transform_and_read_every_channel(channels):
  transformed = halves(channels, 24)
  for block in range(22):
    count = transformed[block : block + 3].sum(0)
    assert ((count >= 1) & (count <= 2)).all()
  # In flows of two blocks, each channel is transformed once. An odd number leaves one channel.
  assert (halves(channels, 2).sum(0) == 1).sum() == channels - channels % 2


@pytest.mark.parametrize('channels', [16, 48, 192])
def test_blocks_have_different_splits(channels):
  """Four blocks separate nearly all pairs of channels, eight blocks all or nearly all."""
  for blocks, expected in ((4, 0.87), (8, 0.97)):
    transformed = halves(channels, blocks)
    separated = (transformed[:, :, None] != transformed[:, None]).any(0)
    assert separated.sum() / (channels * (channels - 1)) > expected


@pytest.mark.parametrize('channels, blocks', [(7, 3), (4, 2), (16, 5)])
def test_latents_and_outputs_of_blocks_have_the_order_of_x(channels, blocks):
  """New blocks only permute channels."""
  module = tiny.make_flow(N, channels, flow_class=coupling.CouplingFlow, blocks=blocks)
  block = tiny.make_block(N, channels, coupling.CouplingBlock, blocks=blocks)
  x = z = tiny.normals(1, N, channels)
  for t in range(blocks):
    z = block.init_with_output(jax.random.key(0), z, None)[0][0]
    assert (z != x).any()
    np.testing.assert_array_equal(module.in_order(z, t + 1), x)
  np.testing.assert_array_equal(module.latents(z), x)
  np.testing.assert_array_equal(module.final_output(x), z)


def test_permutation_never_changes():
  """Checkpoints depend on it."""
  assert coupling.channel_permutation(12, 3).tolist() == [8, 5, 11, 2, 6, 10, 9, 3, 4, 0, 7, 1]
  assert coupling.channel_permutation(5, 2).tolist() == [4, 2, 3, 0, 1]


def reference_block(p, x, read):
  """Computes a coupling block with one layer in NumPy. Returns z in the order of x, and log-det."""

  def norm(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale']

  def heads(a):  # [B, N, 8] -> [B, 2, N, 4]
    return a.reshape(*a.shape[:2], 2, 4).transpose(0, 2, 1, 3)

  h = x[..., :read] @ p['in_proj']['kernel'] + p['in_proj']['bias'] + p['positions']
  layer = jax.tree.map(lambda a: a[0], p['transformer']['stack'])
  normed = norm(layer['attention_norm'], h)
  q, k, v = (heads(normed @ layer[name]['kernel']) for name in ('query', 'key', 'value'))
  weights = np.exp(q @ k.swapaxes(2, 3) / 2)
  attended = weights / weights.sum(-1, keepdims=True) @ v
  h = h + attended.transpose(0, 2, 1, 3).reshape(h.shape) @ layer['attention_out']['kernel']
  u = norm(layer['mlp_norm'], h) @ layer['mlp_in']['kernel']
  u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
  h = h + u @ layer['mlp_out']['kernel']
  shift = h @ p['shift_proj']['kernel'] + p['shift_proj']['bias']
  log_scale = norm(p['norm'], h) @ p['log_scale_proj']['kernel'] + p['log_scale_proj']['bias']
  z = (x[..., read:] - shift) / np.exp(log_scale)
  return np.concatenate([x[..., :read], z], -1), -log_scale.sum((1, 2))


def test_density_equals_a_reference():
  """Two blocks and a standard normal prior, with tokens of 2 × 2 pixels."""
  changes = dict(patch_basis='pixels', patch_size=2)
  model_config = tiny.model_config(dict(kind='coupling'), dict(kind='normal'), **changes)
  images, labels = tiny.normals(3, 4, 4, 1), jnp.zeros(3, jnp.int32)
  model = tiny.Compiled(farmer.Farmer(4, 1, 3, model_config), images, labels)
  found = model()(images, labels)
  stack = jax.tree.map(np.asarray, model.params['flow']['stack'])
  x = np.asarray(images).reshape(3, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(3, 4, 4)
  for t in range(2):
    x, log_det = reference_block(jax.tree.map(lambda p, t=t: p[t], stack), x, 2)
    np.testing.assert_allclose(found.log_dets[t], log_det, rtol=1e-9)
    x = x[..., coupling.channel_permutation(4, 2)]
  expected = stats.norm.logpdf(x).sum((1, 2)) + found.log_dets.sum(0)
  np.testing.assert_allclose(found.total, expected, rtol=1e-9)


def test_rematerialization_and_unrolling_change_nothing():
  """Outputs and gradients."""
  x, channels, results = tiny.normals(3, N, 4), 4, []
  make = functools.partial(
    tiny.make_flow, N, channels, 3, coupling.CouplingFlow, blocks=2, layers=2
  )
  params = tiny.filled_parameters(make(), x, LABELS)
  for settings in ({}, dict(remat='dots', unroll=4), dict(remat='layers'), dict(remat='full')):
    module = make(**settings)

    def loss(params, module=module):
      z, log_dets = module.apply({'params': params}, x, LABELS)
      return (z**3).sum() + (log_dets**2).sum()

    results.append(jax.jit(jax.value_and_grad(loss))(params))
  assert all((leaf != 0).any() for leaf in jax.tree.leaves(results[0]))
  for other in results[1:]:
    close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9)
    jax.tree.map(close, other, results[0])
