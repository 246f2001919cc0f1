"""The transformer and attention: comparison with NumPy, derivatives, cache, query chunks."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from farmer_jax.nn import attention, layers, transformer
from tests.support import models as tiny

pytestmark = pytest.mark.usefixtures('x64')

B, N, WIDTH = 3, 8, 8


@pytest.fixture(scope='module')
def model(x64):
  """A module, its variables, an input and its output."""
  x = tiny.normals(B, N, WIDTH)
  model = tiny.Compiled(tiny.make_transformer(layers=3), x)
  return model.module, {'params': model.params}, x, np.asarray(model()(x))


def output_and_gradient(module, variables, x):
  """Returns the output, and the parameter gradient of a function of the output."""
  jax.clear_caches()  # tests change constants of modules

  def loss(variables):
    y = module.apply(variables, x)
    return (y**3).sum(), y

  gradient, y = jax.jit(jax.grad(loss, has_aux=True))(variables)
  return y, gradient


@pytest.fixture(scope='module')
def assert_unchanged(model):
  """Asserts that a change of the module or of a constant has changed no output or gradient."""
  _, variables, x, output = model
  gradient = output_and_gradient(*model[:3])[1]

  def check(module, atol=1e-10):
    actual_output, actual = output_and_gradient(module, variables, x)
    np.testing.assert_allclose(actual_output, output, atol=1e-12)
    close = functools.partial(np.testing.assert_allclose, atol=atol)
    jax.tree.map(close, actual, gradient)

  return check


def reference(params, x, num_layers, heads):
  """Computes pre-norm attention and MLP in NumPy, one head and one query at a time."""

  def norm(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale']

  def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  for layer in range(num_layers):
    p = jax.tree.map(lambda a, layer=layer: np.asarray(a[layer]), params['stack'])
    normed = norm(p['attention_norm'], x)
    projected = [
      (normed @ p[name]['kernel']).reshape(*x.shape[:2], heads, -1)
      for name in ('query', 'key', 'value')
    ]
    if 'query_norm' in p:
      projected[:2] = norm(p['query_norm'], projected[0]), norm(p['key_norm'], projected[1])
    attended = np.zeros_like(projected[0])
    for head in range(heads):
      q, k, v = (part[:, :, head] for part in projected)
      for i in range(x.shape[1]):
        scores = np.einsum('bd,bmd->bm', q[:, i], k[:, : i + 1]) / q.shape[-1] ** 0.5
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        attended[:, i, head] = np.einsum('bm,bmd->bd', weights, v[:, : i + 1])
    x = x + attended.reshape(x.shape) @ p['attention_out']['kernel']
    normed = norm(p['mlp_norm'], x)
    hidden = normed @ p['mlp_in']['kernel']
    if 'mlp_gate' in p:
      gate = normed @ p['mlp_gate']['kernel']
      hidden = hidden * gate / (1 + np.exp(-gate))
    else:
      hidden = gelu(hidden)
    x = x + hidden @ p['mlp_out']['kernel']
  return x


def test_full_pass_equals_reference(model):
  _, variables, x, output = model
  expected = reference(jax.tree.map(np.asarray, variables['params']), np.asarray(x), 3, heads=2)
  np.testing.assert_allclose(output, expected, atol=1e-12)


def test_gated_mlps_and_normalized_queries_equal_reference():
  """The cached pass must cache normalized keys."""
  x = tiny.normals(B, N, WIDTH)
  model = tiny.Compiled(tiny.make_transformer(layers=2, gated=True, qk_norm=True), x)
  expected = reference(jax.tree.map(np.asarray, model.params), np.asarray(x), 2, heads=2)
  np.testing.assert_allclose(model()(x), expected, atol=1e-12)
  variables = {'params': model.params}
  layer_params = model.module.apply(variables, method='layer_params')
  cache = model.module.apply(variables, B, N, method='init_cache')
  for start, end in ((0, 3), (3, N)):
    arguments = x[:, start:end], layer_params, cache, start
    hidden, cache = model.module.apply(variables, *arguments, method='extend')
    np.testing.assert_allclose(hidden, expected[:, start:end], atol=1e-12)


def test_derivatives_equal_finite_differences(model):
  """Covers both modes, and second derivatives of the weighted sums, which have a custom rule."""
  module, variables, x, _ = model
  apply = jax.jit(lambda x: module.apply(variables, x))
  jax.test_util.check_grads(apply, (x,), order=1, modes=['fwd', 'rev'])
  weights, values = abs(tiny.normals(2, 2, 3, 5)), tiny.normals(2, 2, 5, 4, seed=1)
  sums = jax.jit(attention._weighted_sums)
  jax.test_util.check_grads(sums, (weights, values), order=2, modes=['fwd', 'rev'])


def test_causality(model):
  """Each token depends on itself and all earlier tokens. Other derivatives are exactly zero."""
  module, variables, x, _ = model
  jacobian = jax.jit(jax.jacfwd(lambda x: module.apply(variables, x[None])[0]))(x[0])
  causal = np.tril(np.ones((N, N), bool))
  np.testing.assert_array_equal((jacobian != 0).all((1, 3)), causal)
  np.testing.assert_array_equal((jacobian == 0).all((1, 3)), ~causal)


def test_cached_pass_equals_full_pass(model):
  """The cached pass reads pieces of different sizes. Unused cache entries are random numbers."""
  module, variables, x, output = model
  layer_params = module.apply(variables, method='layer_params')
  extend = jax.jit(functools.partial(module.apply, method='extend'))
  empty = module.apply(variables, B, N + 2, method='init_cache')
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(empty))
  random = jax.tree.map(lambda a: a + tiny.normals(*a.shape, seed=1) * 1e3, empty)
  for pieces in ((1,) * N, (N,), (1, 5, 2)):
    cache, start = random, 0
    for n in pieces:
      hidden, cache = extend(variables, x[:, start : start + n], layer_params, cache, start)
      np.testing.assert_allclose(hidden, output[:, start : start + n], atol=1e-12)
      start += n
  hidden, cache = extend(variables, x, layer_params)
  np.testing.assert_allclose(hidden, output, atol=1e-12)
  assert cache is None


def test_unrolling_and_rematerialization_change_nothing(assert_unchanged):
  assert_unchanged(tiny.make_transformer(layers=3, unroll=8, remat='dots'), atol=1e-11)


@pytest.mark.parametrize('unroll, in_loop, expected', [(1, False, 0), (3, True, 0), (3, False, 1)])
def test_compiler_cannot_undo_rematerialization_without_a_loop(unroll, in_loop, expected):
  module = tiny.make_transformer(layers=3, unroll=unroll, remat='layers', in_loop=in_loop)
  x = tiny.normals(2, 4, module.stack_config.width)
  text = str(jax.make_jaxpr(lambda x: module.init_with_output(jax.random.key(0), x)[0])(x))
  assert f'prevent_cse={bool(expected)}' in text and f'prevent_cse={not expected}' not in text


def test_default_unrolling_depends_on_the_platform(monkeypatch):
  assert transformer.default_unroll(2, 'none') == 16
  assert transformer.default_unroll(2, 'layers') == 1
  monkeypatch.setattr(layers, 'target_platform', lambda: 'tpu')
  assert [transformer.default_unroll(n, 'layers') for n in (4, 8, 24)] == [4, 8, 4]


def test_scan_with_growing_cache(monkeypatch):
  """The cache always has space for the tokens. The last segment can be shorter."""
  monkeypatch.setattr(attention, '_MIN_SEGMENT_TOKENS', 2)
  lengths = []

  def step(carry, token):
    total, cache = carry
    lengths.append(cache.shape[2])
    cache = jax.lax.dynamic_update_slice(cache, token[None, None, :, None], (0, 0, token[0], 0))
    return (total + token.sum(), cache), cache.sum()

  tokens = jnp.arange(11)[:, None]
  total, sums = attention.scan_with_cache(step, 0, jnp.zeros((1, 1, 0, 1), int), tokens)
  assert lengths == [3, 6, 9, 11] and total == 55
  np.testing.assert_array_equal(sums, np.cumsum(np.arange(11)))


@pytest.mark.parametrize('chunk, num_chunks', [(4, 2), (3, 3), (5, 1)])
def test_query_chunks_change_nothing(model, assert_unchanged, monkeypatch, chunk, num_chunks):
  """A sequence shorter than two chunks is not split. Three chunks have different lengths."""
  module, variables, x, _ = model
  monkeypatch.setattr(attention, '_QUERY_CHUNK', chunk)
  jax.clear_caches()
  assert str(jax.make_jaxpr(module.apply)(variables, x)).count(' exp ') == num_chunks
  if num_chunks == 3:
    assert_unchanged(module)


def test_products_without_merged_axes_change_nothing(model, assert_unchanged, monkeypatch):
  """Accelerators use these products."""
  module, variables, x, _ = model
  monkeypatch.setattr(layers, 'target_platform', lambda: 'tpu')
  assert_unchanged(module)
  program = str(jax.make_jaxpr(module.apply)(variables, x))
  assert 'dimension_numbers=(([2], [0]), ([], []))' in program
