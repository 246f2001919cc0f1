"""The flow: exact inverse, exact log-determinants, causality and the token order."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax.nn import flow as flow_lib
from tests.support import models as tiny

pytestmark = pytest.mark.usefixtures('x64')

N, D = 4, 2
LABELS = jnp.asarray([0, 1, 3], jnp.int32)  # 3: no class

FLOWS = {
  'one block': dict(blocks=1, max_log_scale=0.2, unroll=8),
  'three blocks': dict(blocks=3, final_permutation=False, num_classes=3, remat='full'),
  'two blocks of two layers': dict(blocks=2, layers=2, remat='dots'),
}


def jacobian_of(apply, mode=jax.jacfwd):
  """Returns Jacobians [B, N, d, N, d] of the first output of `apply(x, labels)`, per example."""

  def one(x, label):
    return mode(lambda x: apply(x[None], label[None])[0][0])(x)

  return jax.jit(jax.vmap(one))


def log_abs_det(jacobian):  # [B, N, d, N, d]
  return np.linalg.slogdet(np.asarray(jacobian).reshape(-1, N * D, N * D))[1]


@pytest.fixture(
  scope='module', params=[*list(FLOWS)[:2], pytest.param(list(FLOWS)[2], marks=pytest.mark.slow)]
)
def flow(request, x64):
  """A flow, its inverse, and its outputs for an input."""
  x = tiny.normals(3, N, D)
  model = tiny.Compiled(tiny.make_flow(N, D, **FLOWS[request.param]), x, LABELS)

  @functools.partial(jax.jit, static_argnums=1)
  def inverse(z, chunk_sizes=None):
    return model.apply(z, LABELS, chunk_sizes, 0.0, method='inverse')

  z, log_dets = model()(x, LABELS)
  return types.SimpleNamespace(
    model=model,
    section=model.module.flow,
    inverse=inverse,
    x=x,
    z=z,
    log_dets=np.asarray(log_dets),
    jacobian=np.asarray(jacobian_of(model.apply)(x, LABELS)),
  )


def test_inverse_and_forward_pass_invert_each_other(flow):
  assert abs(flow.z - flow.x).max() > 0.5
  np.testing.assert_allclose(flow.inverse(flow.z)[0], flow.x, atol=1e-10)
  np.testing.assert_allclose(flow.model()(flow.inverse(flow.x)[0], LABELS)[0], flow.x, atol=1e-10)


@pytest.mark.parametrize('chunk_sizes', [(2, 2, 2), (N - 1, 1, N + 5), (1, 1, N - 1)])
def test_chunked_inverse_equals_sequential_inverse(flow, chunk_sizes):
  """Chunk sizes may differ between blocks, not divide the sequence, or exceed the sequence.

  The result is exact after as many rounds as a chunk has tokens.
  """
  chunk_sizes = chunk_sizes[: flow.section.blocks]
  x, convergence = flow.inverse(flow.z, chunk_sizes)
  np.testing.assert_allclose(x, flow.inverse(flow.z)[0], atol=1e-12)
  assert convergence.residual.shape == convergence.passes.shape == (flow.section.blocks, 3)
  assert (convergence.residual == 0).all()
  assert (convergence.passes <= np.minimum(chunk_sizes, N - 1)[:, None]).all()


def test_log_det_and_reverse_mode_equal_the_jacobian(flow):
  """Reverse mode covers rematerialization."""
  expected = log_abs_det(flow.jacobian)
  assert abs(expected).min() > 0.01
  np.testing.assert_allclose(flow.log_dets.sum(0), expected, atol=1e-10)
  jacobian = jacobian_of(flow.model.apply, jax.jacrev)(flow.x, LABELS)
  np.testing.assert_allclose(jacobian, flow.jacobian, atol=1e-11)


def test_flow_equals_its_blocks_in_sequence(flow):
  """The log-determinant of each block equals the log-determinant of its Jacobian."""
  condition, params = jnp.zeros((3, 8)), flow.model.params
  if flow.model.module.num_classes:
    condition = params['class_embedding']['embedding'][LABELS]
  module = flow_lib.FlowBlock(flow.section, flow.model.module.stack_config, N, D)

  @jax.jit
  def run(params, z):
    apply = functools.partial(module.apply, {'params': params})
    return *apply(z, condition), jacobian_of(apply)(z, condition)

  z = flow.x
  for t, log_det in enumerate(flow.log_dets):
    z, block_log_det, jacobian = run(jax.tree.map(lambda p, t=t: p[t], params['stack']), z)
    np.testing.assert_allclose(block_log_det, log_abs_det(jacobian), atol=1e-11)
    np.testing.assert_allclose(log_det, block_log_det, atol=1e-11)
  last = flow.z if flow.section.final_permutation else flow.z[:, ::-1]
  np.testing.assert_allclose(last, z, atol=1e-11)


def test_block_is_causal_and_does_not_change_the_first_token():
  """Derivatives by later tokens are exactly 0. Each token depends on all earlier tokens."""
  z = tiny.normals(3, N, D)
  block = tiny.Compiled(tiny.make_block(N, D, layers=2), z, None)

  def one(z):
    return jax.tree.map(lambda a: a[0], block.apply(z[None], None))

  derivatives = jax.jit(jax.vmap(jax.jacfwd(one)))(z)
  jacobian, log_det_gradient = map(np.asarray, derivatives)
  jacobian = jacobian[:, ::-1]  # tokens in the order of the input
  np.testing.assert_array_equal(block()(z, None)[0][:, -1], z[:, 0])
  for i, j in np.ndindex(N, N):
    part = jacobian[:, i, :, j]  # [B, d, d]
    if j > i:
      assert (part == 0).all()
    elif j < i:
      assert (abs(part) > 1e-6).all()
    else:
      diagonal = np.diagonal(part, axis1=1, axis2=2)
      assert (part == diagonal[:, :, None] * np.eye(D)).all()
      assert (diagonal > 0).all()
      assert (diagonal == 1).all() if i == 0 else (abs(np.log(diagonal)) > 1e-6).all()
  assert (log_det_gradient[:, -1] == 0).all()  # no token depends on the last token
  assert (abs(log_det_gradient[:, :-1]) > 1e-6).all()


@pytest.fixture(scope='module')
def nine(x64):
  """A flow of 3×3 tokens with neighborhoods, and its outputs for an input."""
  x = tiny.normals(2, 9, D)
  model = tiny.Compiled(tiny.make_flow(9, D, blocks=2, neighborhood=True), x, LABELS[:2])
  z, log_dets = model()(x, LABELS[:2])
  return types.SimpleNamespace(model=model, x=x, z=z, log_dets=log_dets)


def test_log_det_with_neighborhoods_equals_the_jacobian(nine):
  jacobian = np.asarray(jacobian_of(nine.model.apply)(nine.x, LABELS[:2]))
  expected = np.linalg.slogdet(jacobian.reshape(2, 9 * D, 9 * D))[1]
  assert abs(expected).min() > 0.01
  np.testing.assert_allclose(nine.log_dets.sum(0), expected, atol=1e-10)


@pytest.mark.parametrize('chunk_size', [1, 3, 8])
def test_inverse_with_neighborhoods(nine, chunk_size):
  """A chunk needs tokens of the row before it, which are in earlier chunks."""
  chunks = (chunk_size,) * 2
  x, _ = nine.model.apply(nine.z, LABELS[:2], chunks, 0.0, method='inverse')
  np.testing.assert_allclose(x, nine.x, atol=1e-10)


def test_neighborhoods_are_inputs(nine):
  """Without attention to other tokens, a token depends on its left, right and upper neighbors."""
  x = nine.x[:1]
  block = tiny.make_block(9, D, layers=1, neighborhood=True)
  params = tiny.filled_parameters(block, x, None)
  params['transformer'] = jax.tree.map(jnp.zeros_like, params['transformer'])  # only residuals

  def shifts(x):
    return block.apply({'params': params}, x, None, method='affine_parameters')[0][0]

  depends = (np.asarray(jax.jit(jax.jacfwd(shifts))(x)) != 0).any((1, 2, 4))
  expected = np.zeros((9, 9), bool)
  for i in range(1, 9):
    for j in (i - 1, i - 2, i - 3, i - 4):  # left, above on the right, above, above on the left
      if j >= 0:
        expected[i, j] = True
  np.testing.assert_array_equal(depends, expected)


@pytest.mark.parametrize('final_permutation', [True, False])
def test_token_order_alternates_between_blocks(final_permutation):
  """If only one block is not the identity, the Jacobian is triangular in its token order."""
  blocks = 3
  module = tiny.make_flow(N, D, blocks=blocks, final_permutation=final_permutation)
  x, label = tiny.normals(1, N, D), LABELS[:1]
  params = tiny.filled_parameters(module, x, label)

  @jax.jit
  def jacobian(params):
    return jacobian_of(functools.partial(module.apply, {'params': params}))(x, label)[0]

  for t in range(blocks):
    mask = np.arange(blocks) == t
    out = jax.tree.map(
      lambda p, mask=mask: p * mask.reshape(-1, *[1] * (p.ndim - 1)),
      {name: params['stack'][name] for name in ('shift_proj', 'log_scale_proj')},
    )
    changed = params | {'stack': params['stack'] | out}
    depends = (np.asarray(jacobian(changed)) != 0).any((1, 3))  # [token of z, token of x]
    depends = depends[::-1] if final_permutation else depends
    triangular = np.tril(np.ones((N, N), bool))
    np.testing.assert_array_equal(depends, triangular.T if t % 2 else triangular)


def test_identity_at_initialization():
  """The flow is exactly the identity up to the token order. Only output projections are zero."""
  with jax.enable_x64(False):
    x = tiny.normals(3, N, D).astype(jnp.float32)
    for final_permutation, expected in ((True, x[:, ::-1]), (False, x)):  # three reversals
      changes = dict(dtype='float32', final_permutation=final_permutation)
      module = tiny.make_flow(N, D, num_classes=3, **changes)
      variables = jax.jit(module.init)(jax.random.key(0), x, LABELS)
      z, log_dets = jax.jit(module.apply)(variables, x, LABELS)
      np.testing.assert_array_equal(z, expected)
      assert log_dets.shape == (3, 3) and (log_dets == 0).all()
  kernel = np.asarray(variables['params']['stack']['in_proj']['kernel'])
  assert len(np.unique(kernel)) == kernel.size  # the blocks start with different parameters


def test_last_token_in_the_transformer_changes_nothing(monkeypatch):
  """Outputs and gradients are equal if the transformer keeps the last token of long sequences."""
  x = tiny.normals(3, N, D)
  model = tiny.Compiled(tiny.make_flow(N, D, blocks=1), x, LABELS)

  def loss(params):
    z, log_dets = model.apply(x, LABELS, params=params)
    return (z**3).sum() + (log_dets**2).sum(), (z, log_dets)

  expected = jax.jit(jax.grad(loss, has_aux=True))(model.params)
  monkeypatch.setattr(flow_lib, '_MAX_CUT_TOKENS', 0)
  jax.clear_caches()
  actual = jax.jit(jax.grad(loss, has_aux=True))(model.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), actual, expected)
