"""The flow: exact inverse, exact log-determinants, causality, and the order of the tokens."""

import functools
import types

import flax.linen as nn
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
  'one block': dict(blocks=1),
  'two blocks, two layers, no memory': dict(blocks=2, layers=2, remat='dots'),
  'two blocks, no final permutation, classes, unrolled': dict(
    blocks=2, final_permutation=False, num_classes=3, unroll=8
  ),
  'two blocks, bounded scales': dict(blocks=2, max_log_scale=0.2),
  'three blocks, no final permutation, classes, less memory': dict(
    blocks=3, final_permutation=False, num_classes=3, remat='full'
  ),
}


def jacobian_of(apply, mode=jax.jacfwd):
  """Jacobians [B, N, d, N, d] of the first output of `apply(x, labels)`, an example at a time."""

  def one(x, label):
    return mode(lambda x: apply(x[None], label[None])[0][0])(x)

  return jax.jit(jax.vmap(one))


def log_abs_det(jacobian):  # [B, N, d, N, d]
  return np.linalg.slogdet(np.asarray(jacobian).reshape(-1, N * D, N * D))[1]


@pytest.fixture(scope='module', params=list(FLOWS))
def flow(request, x64):
  """A flow, its parameters, its two directions compiled, and what it makes of some data."""
  module = tiny.make_flow(tokens=N, channels=D, **FLOWS[request.param])
  x = tiny.normals(3, N, D)
  params = tiny.filled_parameters(module, x, LABELS)

  def forward(x, labels):
    return module.apply({'params': params}, x, labels)

  def inverse(z, chunks=None, tolerance=0.0):
    return module.apply({'params': params}, z, LABELS, chunks, tolerance, method='inverse')

  z, log_dets = (encode := jax.jit(forward))(x, LABELS)
  return types.SimpleNamespace(
    module=module,
    params=params,
    forward=forward,
    encode=encode,
    decode=jax.jit(lambda z: inverse(z)[0]),
    inverse=jax.jit(inverse, static_argnums=(1, 2)),
    x=x,
    z=z,
    log_dets=np.asarray(log_dets),
    jacobian=np.asarray(jacobian_of(forward)(x, LABELS)),
  )


def test_inverse_undoes_the_flow_and_the_flow_its_inverse(flow):
  assert abs(flow.z - flow.x).max() > 0.5  # there is something to undo
  assert abs(flow.decode(flow.z) - flow.x).max() < 1e-10
  assert abs(flow.encode(flow.decode(flow.x), LABELS)[0] - flow.x).max() < 1e-10


@pytest.mark.parametrize('chunk', [2, N - 1, N + 5])
def test_chunks_end_where_the_sequential_inverse_does(flow, chunk):
  """Also chunks that do not divide the tokens, or are larger than all; with as many rounds as they
  have tokens, to the last digit."""
  x, report = flow.inverse(flow.z, (chunk,) * flow.module.blocks)
  np.testing.assert_allclose(x, flow.decode(flow.z), atol=1e-12)
  assert report.residual.shape == report.passes.shape == (flow.module.blocks, 3)
  assert (np.asarray(report.residual) == 0).all()
  assert (np.asarray(report.passes) <= min(chunk, N - 1)).all()


def test_blocks_may_be_inverted_each_in_its_own_way(flow):
  chunks = [(1, 2, N), (1, 1, 2), (2, 1, 2)]
  for each in chunks:
    x, _ = flow.inverse(flow.z, each[: flow.module.blocks])
    np.testing.assert_allclose(x, flow.x, atol=1e-10)


def test_one_block_undone_alone_is_a_link_of_the_chain(flow):
  module = flow.module
  z = flow.z if module.final_permutation else flow.z[:, ::-1]
  undo = jax.jit(
    lambda z, t: module.apply({'params': flow.params}, z, LABELS, t, method='inverse_block')[0]
  )
  for t in reversed(range(module.blocks)):
    z = undo(z, t)
  np.testing.assert_allclose(z, flow.x, atol=1e-10)


def test_stages_are_the_links_of_the_chain(flow):
  module, run = flow.module, functools.partial(flow.module.apply, {'params': flow.params})
  stages = jax.jit(functools.partial(run, method='stages'))(flow.x, LABELS)
  assert stages.shape == (module.blocks + 1, *flow.x.shape)
  np.testing.assert_array_equal(stages[0], flow.x)
  last = flow.z if module.final_permutation else flow.z[:, ::-1]
  np.testing.assert_allclose(stages[-1], last, atol=1e-12)
  undo = jax.jit(functools.partial(run, method='inverse_block'))
  for t in range(module.blocks):
    np.testing.assert_allclose(undo(stages[t + 1], LABELS, t)[0], stages[t], atol=1e-10)


def test_a_student_guesses_block_by_block(flow):
  """What a student makes of the last stage, written out; and improved until it is exact."""
  module = flow.module.clone(causal=False)
  params = tiny.filled_parameters(module, flow.x, LABELS, seed=1)
  last = flow.z if module.final_permutation else flow.z[:, ::-1]
  run = functools.partial(module.apply, {'params': params}, method='guess')
  guesses, hidden = jax.jit(run)(last, LABELS)
  assert hidden.shape == (module.blocks, 3, N - 1, module.width)
  block = tiny.make_block(
    tokens=N,
    channels=D,
    layers=module.layers,
    max_log_scale=module.max_log_scale,
    causal=False,
  )
  condition, z = None, last
  if module.num_classes:
    condition = params['class_embedding']['embedding'][LABELS]
  for t in reversed(range(module.blocks)):
    part = jax.tree.map(lambda p, t=t: p[t], params['stack'])
    z, h = block.apply({'params': part}, z, condition, method='guess')
    np.testing.assert_allclose(guesses[t], z, atol=1e-12)
    np.testing.assert_allclose(hidden[t], h, atol=1e-12)
  assert abs(guesses[0] - flow.x).max() > 0.1

  @functools.partial(jax.jit, static_argnums=(0,))
  def improved(rounds):
    def run(teacher):
      student = module.bind({'params': params})
      return teacher.inverse_from_guesses(student, last, LABELS, 0.0, rounds)

    return nn.apply(run, flow.module)({'params': flow.params})

  x, report = improved(0)
  np.testing.assert_allclose(x, guesses[0], atol=1e-12)
  assert np.isnan(report.residual).all() and (report.passes == 1).all()
  x, report = improved(N)
  np.testing.assert_allclose(x, flow.x, atol=1e-10)
  assert (report.residual == 0).all()
  assert abs(improved(1)[0] - flow.x).max() > 1e-6


def test_log_det_is_that_of_the_jacobian(flow):
  expected = log_abs_det(flow.jacobian)
  assert abs(expected).min() > 0.01
  np.testing.assert_allclose(flow.log_dets.sum(0), expected, atol=1e-10)


def test_reverse_mode_agrees_with_forward_mode(flow):
  """Training runs backwards, through whatever is computed again to save memory."""
  backwards = jacobian_of(flow.forward, jax.jacrev)(flow.x, LABELS)
  np.testing.assert_allclose(backwards, flow.jacobian, atol=1e-11)


@functools.cache
def one_block(**settings):
  """A compiled block: (params, z, condition) to its output, its log-det and its Jacobian."""
  apply = tiny.make_block(tokens=N, channels=D, **settings).apply

  @jax.jit
  def run(params, z, condition):
    block = functools.partial(apply, {'params': params})
    return *block(z, condition), jacobian_of(block)(z, condition)

  return run


def test_log_det_of_each_block_is_that_of_its_jacobian(flow):
  """The blocks one by one, by hand: their chain is the flow, their log-dets its entries."""
  module, z, condition = flow.module, flow.x, jnp.zeros((3, flow.module.width))
  if module.num_classes:
    condition = flow.params['class_embedding']['embedding'][LABELS]
  for t, log_det in enumerate(flow.log_dets):
    params = jax.tree.map(lambda p, t=t: p[t], flow.params['stack'])
    z, own_log_det, jacobian = one_block(layers=module.layers, max_log_scale=module.max_log_scale)(
      params, z, condition
    )
    np.testing.assert_allclose(own_log_det, log_abs_det(jacobian), atol=1e-11)
    np.testing.assert_allclose(log_det, log_abs_det(jacobian), atol=1e-11)
  np.testing.assert_allclose(flow.z, z if module.final_permutation else z[:, ::-1], atol=1e-11)


@pytest.fixture(scope='module')
def block(x64):
  """A block's outputs, Jacobians of its output and log-det, all exact."""
  module = tiny.make_block(tokens=N, channels=D, layers=2)
  z = tiny.normals(3, N, D)
  params = tiny.filled_parameters(module, z, None)

  @jax.jit
  def run(z):
    def one(z):
      value, log_det = module.apply({'params': params}, z[None], None)
      return value[0], log_det[0]

    return jax.vmap(one)(z), jax.vmap(jax.jacfwd(one))(z)

  (value, log_det), (jacobian, log_det_gradient) = jax.tree.map(np.asarray, run(z))
  # Back to the order in which the tokens came in.
  return dict(
    z=np.asarray(z),
    value=value[:, ::-1],
    jacobian=jacobian[:, ::-1],
    log_det=log_det,
    log_det_gradient=log_det_gradient,
  )


def test_block_is_causal_and_leaves_the_first_token_alone(block):
  """The zeros are exact, and what should depend does: every later token on every earlier one."""
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
        assert (diagonal == 1).all() if i == 0 else (abs(np.log(diagonal)) > 1e-6).all()
  # The last token scales nothing.
  assert (block['log_det_gradient'][:, -1] == 0).all()
  assert (abs(block['log_det_gradient'][:, :-1]) > 1e-6).all()


def test_true_context_makes_a_guess_exact():
  """What a student has to learn: the teacher's affine step, with the true tokens in sight, undoes
  the teacher's block."""
  x = tiny.normals(3, N, D)
  block = tiny.make_block(tokens=N, channels=D, layers=2)
  params = tiny.filled_parameters(block, x, None)
  z, _ = block.apply({'params': params}, x, None)
  guess = functools.partial(block.apply, {'params': params}, z, None, method='guess')
  np.testing.assert_allclose(guess(x)[0], x, atol=1e-12)
  assert abs(guess()[0] - x).max() > 0.1


def test_a_student_sees_all_tokens():
  """All but the one at the end, which no token of the result needs."""
  x = tiny.normals(1, N, D)
  block = tiny.make_block(tokens=N, channels=D, causal=False)
  params = tiny.filled_parameters(block, x, None)
  jacobian = jax.jacfwd(lambda z: block.apply({'params': params}, z, None, method='guess')[0])(x)
  depends = (abs(jacobian[0, :, :, 0]) > 1e-6).any((1, 3))[:, ::-1]  # [result, token in its order]
  expected = np.ones((N, N), bool)
  expected[0] = np.arange(N) == 0
  expected[:, -1] = np.arange(N) == N - 1
  np.testing.assert_array_equal(depends, expected)


def test_block_normalises_by_the_scale_in_its_log_det(block):
  diagonal = np.einsum('bidid->bid', block['jacobian'])
  assert (diagonal > 0).all()
  np.testing.assert_allclose(np.log(diagonal).sum((1, 2)), block['log_det'], atol=1e-12)


@pytest.mark.parametrize('final_permutation', [True, False])
def test_token_order_alternates_between_blocks(final_permutation):
  """With every block but one made the identity, the Jacobian is triangular that block's way."""
  blocks = 3
  module = tiny.make_flow(tokens=N, channels=D, blocks=blocks, final_permutation=final_permutation)
  x, label = tiny.normals(1, N, D), LABELS[:1]
  params = tiny.filled_parameters(module, x, label)

  @jax.jit
  def jacobian(params):
    apply = functools.partial(module.apply, {'params': params})
    return jacobian_of(apply)(x, label)[0]

  reversed_at_the_end = (blocks % 2 == 1) == final_permutation
  for t in range(blocks):
    keep = np.arange(blocks) == t
    out = jax.tree.map(
      lambda p, keep=keep: p * keep.reshape(-1, *[1] * (p.ndim - 1)), params['stack']['out_proj']
    )
    changed = params | {'stack': params['stack'] | {'out_proj': out}}
    depends = (np.asarray(jacobian(changed)) != 0).any((1, 3))  # [token of z, token of x]
    if reversed_at_the_end:
      depends = depends[::-1]
    expected = np.tril(np.ones((N, N), bool))
    np.testing.assert_array_equal(depends, expected if t % 2 == 0 else expected.T)


def test_identity_at_initialisation():
  """Exactly: the output layers are zero, so only the turns of the token order remain."""
  with jax.enable_x64(False):
    x = tiny.normals(3, N, D).astype(jnp.float32)
    module = tiny.make_flow(tokens=N, channels=D, num_classes=3, dtype=jnp.dtype('float32'))
    variables = jax.jit(module.init)(jax.random.key(0), x, LABELS)
    for final_permutation, expected in ((True, x[:, ::-1]), (False, x)):
      changed = module.clone(final_permutation=final_permutation)
      z, log_dets = jax.jit(changed.apply)(variables, x, LABELS)
      np.testing.assert_array_equal(z, expected)  # three blocks turn the tokens three times
      assert log_dets.shape == (3, 3) and (log_dets == 0).all()
  # Only the output layers are zero: the rest must be able to learn, each block its own way.
  kernel = np.asarray(variables['params']['stack']['in_proj']['kernel'])
  assert len(np.unique(kernel)) == kernel.size


def test_class_reaches_each_sample_on_its_own():
  module = tiny.make_flow(num_classes=3)
  x = jnp.broadcast_to(tiny.normals(1, N, D), (4, N, D))
  labels = jnp.asarray([0, 1, 0, 3])
  params = tiny.filled_parameters(module, x, labels)
  z, log_dets = jax.jit(lambda x, labels: module.apply({'params': params}, x, labels))(x, labels)
  np.testing.assert_allclose(z[0], z[2], atol=1e-12)
  for a, b in ((0, 1), (0, 3), (1, 3)):
    assert abs(z[a] - z[b]).max() > 1e-3
    assert (abs(log_dets[:, a] - log_dets[:, b]) > 1e-4).all()


def test_long_sequences_keep_their_last_token_and_change_nothing(flow, monkeypatch):
  """Not what the flow makes of data, nor its gradient; the last token still acts on none."""

  def loss(params):
    z, log_dets = flow.module.apply({'params': params}, flow.x, LABELS)
    return (z**3).sum() + (log_dets**2).sum()

  expected = jax.jit(jax.grad(loss))(flow.params)
  monkeypatch.setattr(flow_lib, '_LONG', 0)
  jax.clear_caches()
  z, log_dets = jax.jit(flow.forward)(flow.x, LABELS)
  np.testing.assert_allclose(z, flow.z, atol=1e-12)
  np.testing.assert_allclose(log_dets, flow.log_dets, atol=1e-12)
  actual = jax.jit(jax.grad(loss))(flow.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), actual, expected)
