"""The transformer against a plain reference, and its cached steps against the full pass."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from farmer_jax.nn import transformer
from tests.support import models as tiny

pytestmark = pytest.mark.usefixtures('x64')

B, N, WIDTH = 3, 6, 8


@pytest.fixture(scope='module')
def model(x64):
  """A module, its parameters, an input and its output."""
  module = tiny.make_transformer(layers=3)
  x = tiny.normals(B, N, WIDTH)
  params = tiny.filled_parameters(module, x)
  return module, {'params': params}, x, np.asarray(jax.jit(module.apply)({'params': params}, x))


def reference(params, x, layers, heads):
  """Pre-norm attention and MLP, a head and a query at a time; results of about unit length."""

  def norm(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale']

  def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  for layer in range(layers):
    p = jax.tree.map(lambda a, layer=layer: np.asarray(a[layer]), params['stack'])
    normed, layers_in = norm(p['attention_norm'], x), ('query', 'key', 'value')
    split = [(normed @ p[i]['kernel']).reshape(*x.shape[:2], heads, -1) for i in layers_in]
    attended = np.zeros_like(split[0])
    for head in range(heads):
      q, k, v = (part[:, :, head] for part in split)
      for i in range(x.shape[1]):
        scores = np.einsum('bd,bmd->bm', q[:, i], k[:, : i + 1]) / q.shape[-1] ** 0.5
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        attended[:, i, head] = np.einsum('bm,bmd->bd', weights, v[:, : i + 1])
    x = x + attended.reshape(x.shape) @ p['attention_out']['kernel']
    hidden = norm(p['mlp_norm'], x) @ p['mlp_in']['kernel']
    x = x + gelu(hidden) @ p['mlp_out']['kernel']
  return norm(params['norm'], x) / np.sqrt(x.shape[-1])


def test_full_pass_against_plain_reference(model):
  _, variables, x, output = model
  expected = reference(jax.tree.map(np.asarray, variables['params']), np.asarray(x), 3, heads=2)
  np.testing.assert_allclose(output, expected, atol=1e-12)


def test_derivatives_against_differences(model):
  """Both modes, and the second order of attention's sums, which have a rule of their own."""
  module, variables, x, _ = model
  apply = jax.jit(module.apply)
  jax.test_util.check_grads(lambda x: apply(variables, x), (x,), order=1, modes=['fwd', 'rev'])
  weights, values = abs(tiny.normals(2, 2, 3, 5)), tiny.normals(2, 2, 5, 4, seed=1)
  sums = transformer._weighted_sums
  jax.test_util.check_grads(sums, (weights, values), order=2, modes=['fwd', 'rev'])


def test_token_sees_itself_and_what_came_before(model):
  module, variables, x, _ = model
  jacobian = jax.jit(jax.jacfwd(lambda x: module.apply(variables, x[None])[0]))(x[0])
  depends = np.asarray(jacobian != 0).all((1, 3))
  independent = np.asarray(jacobian == 0).all((1, 3))
  causal = np.tril(np.ones((N, N), bool))
  np.testing.assert_array_equal(depends, causal)
  np.testing.assert_array_equal(independent, ~causal)


def test_going_on_from_a_cache_equals_the_full_pass(model):
  """In pieces of every size; what the cache held before must not matter."""
  module, variables, x, output = model
  layers = module.apply(variables, method='unstacked')
  extend = jax.jit(functools.partial(module.apply, method='extend'))
  empty = module.apply(variables, B, N + 2, method='init_cache')
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(empty))
  rubbish = jax.tree.map(lambda a: a + tiny.normals(*a.shape, seed=1) * 1e3, empty)
  for pieces in ((1,) * N, (N,), (1, 3, 2), (4, 1, 1)):
    cache, start = rubbish, 0
    for n in pieces:
      hidden, cache = extend(variables, x[:, start : start + n], layers, cache, start)
      np.testing.assert_allclose(hidden, output[:, start : start + n], atol=1e-12)
      start += n
  hidden, cache = module.apply(variables, x, layers, method='extend')
  np.testing.assert_allclose(hidden, output, atol=1e-12)
  assert cache is None


def test_unrolling_and_saving_memory_change_nothing(model):
  module, variables, x, output = model
  weights = tiny.normals(B, N, WIDTH, seed=1)

  def run(module):
    def weighted(variables):
      y = module.apply(variables, x)
      return (y * weights).sum(), y

    return jax.jit(jax.grad(weighted, has_aux=True))(variables)

  expected, _ = run(module)
  actual, y = run(module.clone(unroll=8, remat='dots'))
  np.testing.assert_allclose(y, output, atol=1e-12)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), actual, expected)


def test_scan_over_tokens_with_a_growing_cache(monkeypatch):
  """Segments, the last one short, change nothing; the cache never has less room than tokens."""
  monkeypatch.setattr(transformer, '_SEGMENT_TOKENS', 2)
  lengths = []

  def step(carry, token):
    total, cache = carry
    lengths.append(cache.shape[2])
    cache = jax.lax.dynamic_update_slice(cache, token[None, None, :, None], (0, 0, token[0], 0))
    return (total + token.sum(), cache), cache.sum()

  tokens = jnp.arange(11)[:, None]
  total, sums = transformer.scan_tokens(step, 0, jnp.zeros((1, 1, 0, 1), int), tokens)
  assert lengths == [3, 6, 9, 11] and total == 55
  np.testing.assert_array_equal(sums, np.cumsum(np.arange(11)))


@pytest.mark.parametrize('queries, parts', [(3, 3), (4, 3), (5, 1)])
def test_queries_in_parts_are_the_same(model, monkeypatch, queries, parts):
  """Outputs, and gradients of parameters, of parts that divide the sequence and of such that do
  not; what is little longer than a part stays whole."""
  module, variables, _, _ = model
  x = tiny.normals(B, 9, WIDTH)
  monkeypatch.setattr(transformer, '_QUERIES', 9)
  output, expected = value_and_gradient(module, variables, x)
  monkeypatch.setattr(transformer, '_QUERIES', queries)
  actual_output, actual = value_and_gradient(module, variables, x)
  np.testing.assert_allclose(actual_output, output, atol=1e-12)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), actual, expected)
  assert str(jax.make_jaxpr(module.apply)(variables, x)).count(' exp ') == parts


def test_products_that_merge_no_axes_are_the_same(model, monkeypatch):
  """As accelerators compute them."""
  module, variables, x, output = model
  _, expected = value_and_gradient(module, variables, x)
  monkeypatch.setattr(transformer, '_platform', lambda: 'tpu')
  actual_output, actual = value_and_gradient(module, variables, x)
  np.testing.assert_allclose(actual_output, output, atol=1e-12)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), actual, expected)
  assert 'dimension_numbers=(([2], [0]), ([], []))' in str(
    jax.make_jaxpr(module.apply)(variables, x)
  )


def value_and_gradient(module, variables, x):
  """Of a function of the outputs, traced anew: the outputs, and its gradient by the parameters."""
  jax.clear_caches()

  def loss(variables):
    y = module.apply(variables, x)
    return (y**3).sum(), y

  gradient, y = jax.jit(jax.grad(loss, has_aux=True))(variables)
  return y, gradient
