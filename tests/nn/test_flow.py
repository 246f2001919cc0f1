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
  'one block, bounded scales, unrolled': dict(blocks=1, max_log_scale=0.2, unroll=8),
  'three blocks, no final permutation, classes, remat full': dict(
    blocks=3, final_permutation=False, num_classes=3, remat='full'
  ),
  'two blocks of two layers, remat dots': dict(blocks=2, layers=2, remat='dots'),
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
  """A flow, its parameters, compiled functions, and its outputs for an input."""
  module = tiny.make_flow(N, D, **FLOWS[request.param])
  x = tiny.normals(3, N, D)
  params = tiny.filled_parameters(module, x, LABELS)

  def forward(x, labels):
    return module.apply({'params': params}, x, labels)

  def inverse(z, chunk_sizes=None, tolerance=0.0):
    return module.apply({'params': params}, z, LABELS, chunk_sizes, tolerance, method='inverse')

  z, log_dets = (encode := jax.jit(forward))(x, LABELS)
  return types.SimpleNamespace(
    module=module,
    blocks=module.flow.blocks,
    params=params,
    forward=forward,
    encode=encode,
    decode=jax.jit(lambda z: inverse(z)[0]),
    inverse=jax.jit(inverse, static_argnums=(1, 2)),
    x=x,
    z=z,
    final_output=z if module.flow.final_permutation else z[:, ::-1],
    log_dets=np.asarray(log_dets),
    jacobian=np.asarray(jacobian_of(forward)(x, LABELS)),
  )


def test_inverse_and_forward_pass_invert_each_other(flow):
  assert abs(flow.z - flow.x).max() > 0.5
  np.testing.assert_allclose(flow.decode(flow.z), flow.x, atol=1e-10)
  np.testing.assert_allclose(flow.encode(flow.decode(flow.x), LABELS)[0], flow.x, atol=1e-10)


@pytest.mark.parametrize('chunk_sizes', [(2, 2, 2), (N - 1, 1, N + 5), (1, 1, N - 1)])
def test_chunked_inverse_equals_sequential_inverse(flow, chunk_sizes):
  """Chunk sizes may differ between blocks, not divide the sequence, or exceed the sequence.

  The result is exact after as many rounds as a chunk has tokens.
  """
  chunk_sizes = chunk_sizes[: flow.blocks]
  x, convergence = flow.inverse(flow.z, chunk_sizes)
  np.testing.assert_allclose(x, flow.decode(flow.z), atol=1e-12)
  assert convergence.residual.shape == convergence.passes.shape == (flow.blocks, 3)
  assert (np.asarray(convergence.residual) == 0).all()
  most = np.minimum(chunk_sizes, N - 1)[:, None]
  assert (np.asarray(convergence.passes) <= most).all()


def test_log_det_equals_that_of_the_jacobian(flow):
  expected = log_abs_det(flow.jacobian)
  assert abs(expected).min() > 0.01
  np.testing.assert_allclose(flow.log_dets.sum(0), expected, atol=1e-10)


def test_reverse_mode_equals_forward_mode(flow):
  """Reverse mode covers rematerialization."""
  jacobian = jacobian_of(flow.forward, jax.jacrev)(flow.x, LABELS)
  np.testing.assert_allclose(jacobian, flow.jacobian, atol=1e-11)


def test_flow_equals_its_blocks_in_sequence(flow):
  """The log-determinant of each block equals the log-determinant of its Jacobian."""
  condition = jnp.zeros((3, 8))
  if flow.module.num_classes:
    condition = flow.params['class_embedding']['embedding'][LABELS]
  section, stack = flow.module.flow, flow.module.stack_config
  module = flow_lib.FlowBlock(section, stack, N, D)

  @jax.jit
  def run(params, z):
    apply = functools.partial(module.apply, {'params': params})
    return *apply(z, condition), jacobian_of(apply)(z, condition)

  z = flow.x
  for t, log_det in enumerate(flow.log_dets):
    z, block_log_det, jacobian = run(jax.tree.map(lambda p, t=t: p[t], flow.params['stack']), z)
    np.testing.assert_allclose(block_log_det, log_abs_det(jacobian), atol=1e-11)
    np.testing.assert_allclose(log_det, block_log_det, atol=1e-11)
  np.testing.assert_allclose(flow.final_output, z, atol=1e-11)


@pytest.fixture(scope='module')
def block(x64):
  """The outputs of a block, and exact Jacobians of its output and its log-determinant."""
  module = tiny.make_block(N, D, layers=2)
  z = tiny.normals(3, N, D)
  params = tiny.filled_parameters(module, z, None)

  @jax.jit
  def run(z):
    def one(z):
      value, log_det = module.apply({'params': params}, z[None], None)
      return value[0], log_det[0]

    return jax.vmap(one)(z), jax.vmap(jax.jacfwd(one))(z)

  (value, _), (jacobian, log_det_gradient) = jax.tree.map(np.asarray, run(z))
  return dict(  # tokens in the order of the input
    z=np.asarray(z),
    value=value[:, ::-1],
    jacobian=jacobian[:, ::-1],
    log_det_gradient=log_det_gradient,
  )


def test_block_is_causal_and_does_not_change_the_first_token(block):
  """Derivatives by later tokens are exactly 0. Each token depends on all earlier tokens."""
  np.testing.assert_array_equal(block['value'][:, 0], block['z'][:, 0])
  for i in range(N):
    for j in range(N):
      part = block['jacobian'][:, i, :, j]  # [B, d, d]
      if j > i:
        assert (part == 0).all()
      elif j < i:
        assert (abs(part) > 1e-6).all()
      else:
        diagonal = np.diagonal(part, axis1=1, axis2=2)
        assert (part == diagonal[:, :, None] * np.eye(D)).all()
        assert (diagonal > 0).all()
        assert (diagonal == 1).all() if i == 0 else (abs(np.log(diagonal)) > 1e-6).all()
  assert (block['log_det_gradient'][:, -1] == 0).all()  # no token depends on the last token
  assert (abs(block['log_det_gradient'][:, :-1]) > 1e-6).all()


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
      module = tiny.make_flow(
        N, D, num_classes=3, dtype='float32', final_permutation=final_permutation
      )
      variables = jax.jit(module.init)(jax.random.key(0), x, LABELS)
      z, log_dets = jax.jit(module.apply)(variables, x, LABELS)
      np.testing.assert_array_equal(z, expected)
      assert log_dets.shape == (3, 3) and (log_dets == 0).all()
  kernel = np.asarray(variables['params']['stack']['in_proj']['kernel'])
  assert len(np.unique(kernel)) == kernel.size  # the blocks start with different parameters


def test_each_image_has_its_own_class():
  module = tiny.make_flow(num_classes=3)
  x = jnp.broadcast_to(tiny.normals(1, N, D), (4, N, D))
  labels = jnp.asarray([0, 1, 0, 3])
  params = tiny.filled_parameters(module, x, labels)
  z, log_dets = jax.jit(lambda x, labels: module.apply({'params': params}, x, labels))(x, labels)
  np.testing.assert_allclose(z[0], z[2], atol=1e-12)
  for a, b in ((0, 1), (0, 3), (1, 3)):
    assert abs(z[a] - z[b]).max() > 1e-3
    assert (abs(log_dets[:, a] - log_dets[:, b]) > 1e-4).all()


def test_last_token_in_the_transformer_changes_nothing(monkeypatch):
  """Outputs and gradients are equal if the transformer keeps the last token of long sequences."""
  module = tiny.make_flow(N, D, blocks=1)
  x = tiny.normals(3, N, D)
  params = tiny.filled_parameters(module, x, LABELS)

  def loss(params):
    z, log_dets = module.apply({'params': params}, x, LABELS)
    return (z**3).sum() + (log_dets**2).sum(), (z, log_dets)

  expected = jax.jit(jax.grad(loss, has_aux=True))(params)
  monkeypatch.setattr(flow_lib, '_MAX_CUT_TOKENS', 0)
  jax.clear_caches()
  actual = jax.jit(jax.grad(loss, has_aux=True))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), actual, expected)
