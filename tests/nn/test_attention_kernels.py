"""Kernels compared with XLA's attention, and the choice of a kernel.

Pallas kernels run in interpret mode. cuDNN needs a GPU: its function is replaced by the XLA
implementation of `jax.nn.dot_product_attention`, which tests everything except cuDNN itself.
"""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax.nn import attention, attention_kernels
from tests.support import models as tiny
from tests.support import processes

HEADS, HEAD_DIM = 2, 64


@pytest.fixture(autouse=True)
def _kernels_on_cpus(monkeypatch):
  """Lets kernels run on CPUs, also in float32 and with several blocks of short sequences."""
  monkeypatch.setattr(attention_kernels, '_INTERPRET', True)
  monkeypatch.setattr(attention_kernels, '_DTYPES', (jnp.bfloat16, jnp.float32))
  monkeypatch.setattr(attention_kernels, '_MAX_BLOCK', 128)
  without_cudnn = functools.partial(_xla_instead_of_cudnn, jax.nn.dot_product_attention)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', without_cudnn)
  attention_kernels._log_once.cache_clear()


def _xla_instead_of_cudnn(function, *args, implementation, **kwargs):
  assert implementation == 'cudnn' and args[0].shape[1] % 2 == 0
  return function(*args, implementation='xla', **kwargs)


@pytest.fixture
def on(monkeypatch):
  """Returns a function that makes the devices look like devices of another kind."""
  return lambda kind: monkeypatch.setattr(attention_kernels, '_device_kind', lambda: kind)


def random_heads(tokens, dtype, batch=2):
  shape = batch, HEADS, tokens, HEAD_DIM
  return [tiny.normals(*shape, seed=seed).astype(dtype) for seed in range(4)]


def output_and_gradients(attend, q, k, v, weights):
  output, pull_back = jax.vjp(jax.jit(attend), q, k, v)
  return output, *pull_back(weights.astype(output.dtype))


def reference(q, k, v, causal):
  """Computes attention in NumPy and float64, with queries that are already scaled."""
  scores = np.einsum('bhnd,bhmd->bhnm', *(np.asarray(a, np.float64) for a in (q, k)))
  if causal:
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('bhnm,bhmd->bhnd', weights, np.asarray(v, np.float64))


@pytest.mark.parametrize('kernel', ['splash', 'cudnn'])
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize(
  'tokens, dtype, tolerance',
  [(256, jnp.float32, 2e-5), (191, jnp.float32, 2e-5), (191, jnp.bfloat16, 4e-2)],
)
def test_kernels_equal_the_plain_path(kernel, causal, tokens, dtype, tolerance):
  """An odd length needs padding in both kernels."""
  *arrays, weights = random_heads(tokens, dtype)
  arrays[0] = arrays[0] / 8

  def plain(q, k, v):
    return attention.split_heads(attention.attend(q * 8, k, v, causal), HEAD_DIM)

  kernel_path = functools.partial(attention_kernels.attend, kernel, causal=causal)
  actual = output_and_gradients(kernel_path, *arrays, weights)
  for a, b in zip(actual, output_and_gradients(plain, *arrays, weights), strict=True):
    a, b = np.float32(a), np.float32(b)
    np.testing.assert_allclose(a, b, atol=tolerance * abs(b).max())
  np.testing.assert_allclose(np.float64(actual[0]), reference(*arrays, causal), atol=tolerance)


@pytest.mark.parametrize('kernel', ['splash', 'cudnn'])
def test_causality(kernel):
  """No query depends on later keys and values, also across the blocks of a kernel."""
  tokens = 384 if kernel == 'splash' else 30
  *arrays, weights = random_heads(tokens, jnp.float32, batch=1)

  @jax.jit
  def gradients(cotangent):
    attend = functools.partial(attention_kernels.attend, kernel, causal=True)
    return jax.vjp(attend, *arrays)[1](cotangent)

  for last in (0, tokens // 3, tokens - 2):
    is_early = (jnp.arange(tokens) <= last)[:, None]
    for gradient in gradients(jnp.where(is_early, weights, 0)):
      assert (gradient[:, :, last + 1 :] == 0).all()
    _, k, v = gradients(weights * (jnp.arange(tokens) == last)[:, None])
    assert (v[:, :, : last + 1] != 0).all() and (last == 0 or (k[:, :, : last + 1] != 0).all())


@pytest.mark.parametrize('causal, remat', [(True, 'none'), (True, 'layers'), (False, 'attention')])
def test_transformer_with_a_kernel_equals_the_transformer_without(causal, remat, on):
  """Covers the scan over layers, rematerialization, and the bidirectional student."""
  x = tiny.normals(2, 130, 16).astype(jnp.float32)
  sizes = dict(layers=2, width=16, head_dim=8, dtype=jnp.dtype('float32'))
  make = functools.partial(tiny.make_transformer, causal, **sizes)
  params = tiny.filled_parameters(make(), x)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(module, params, x):
    return jax.value_and_grad(lambda p, x: (module.apply({'params': p}, x) ** 2).mean(), (0, 1))(
      params, x
    )

  expected = gradient(make(), params, x)
  on('TPU v5 lite')
  module = make(remat=remat, attention='splash')
  assert 'pallas_call' in str(jax.make_jaxpr(module.apply)({'params': params}, x))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5)
  jax.tree.map(close, gradient(module, params, x), expected)


@pytest.mark.parametrize(
  'kind, setting, tokens, expected',
  [
    ('TPU v5 lite', 'auto', 1024, 'splash'),
    ('TPU v5 lite', 'auto', 256, 'xla'),
    ('TPU v5 lite', 'splash', 256, 'splash'),
    ('TPU v5 lite', 'cudnn', 1024, 'xla'),
    ('NVIDIA H100 80GB HBM3', 'auto', 1024, 'cudnn'),
    ('NVIDIA H100 80GB HBM3', 'auto', 64, 'xla'),
    ('NVIDIA H100 80GB HBM3', 'splash', 1024, 'xla'),
    ('AMD Instinct MI300X', 'auto', 1024, 'xla'),
    ('cpu', 'auto', 1024, 'xla'),
    ('cpu', 'splash', 1024, 'xla'),
    ('TPU v5 lite', 'xla', 1024, 'xla'),
  ],
)
def test_choice_by_devices_and_length(kind, setting, tokens, expected, on, caplog):
  """The log says why a kernel does not apply, unless nobody expects one."""
  on(kind)
  q = jnp.zeros((1, 1, tokens, HEAD_DIM), jnp.bfloat16)
  with caplog.at_level(logging.INFO):
    assert {attention_kernels.choose(setting, q) for _ in range(2)} == {expected}
  is_silent = expected != 'xla' or setting == 'xla' or (kind, setting) == ('cpu', 'auto')
  assert len(caplog.records) == (0 if is_silent else 1)
  if not is_silent and setting != 'auto':
    assert f'instead of {setting}:' in caplog.records[0].getMessage()


def test_arrays_that_kernels_do_not_accept(on, monkeypatch, caplog):
  monkeypatch.setattr(attention_kernels, '_DTYPES', (jnp.bfloat16,))
  on('NVIDIA H100 80GB HBM3')
  for dtype, head_dim, reason in (
    (jnp.float32, 64, 'float32'),
    (jnp.float64, 64, 'float64'),
    (jnp.bfloat16, 20, 'head dimension 20'),
    (jnp.bfloat16, 256, 'head dimension 256'),
  ):
    with jax.enable_x64(True), caplog.at_level(logging.INFO):
      q = jnp.zeros((1, 1, 1024, head_dim), dtype)
      assert attention_kernels.choose('auto', q) == 'xla'
    assert reason in caplog.records[-1].getMessage()


def test_old_gpus_use_no_kernel(on, monkeypatch):
  on('NVIDIA GeForce RTX 2080')
  monkeypatch.setattr(attention_kernels, '_compute_capability', lambda: 7.5)
  assert attention_kernels.choose('auto', jnp.zeros((1, 1, 1024, 64), jnp.bfloat16)) == 'xla'


def test_decoding_against_a_cache_uses_no_kernel(on):
  on('TPU v5 lite')
  k, v, *_ = random_heads(512, jnp.bfloat16)
  for q, position in ((k[:, :, :4], 0), (k, jnp.int32(0))):
    attend = functools.partial(attention.attend, causal=True, position=position, setting='splash')
    assert 'pallas_call' not in str(jax.make_jaxpr(attend)(q, k, v))


@pytest.mark.faults
def test_splash_attention_on_a_mesh():
  """Images are sharded over data and fsdp, heads over tensor."""
  found = json.loads(processes.run_program('attention_on_mesh', devices=8))
  assert found['difference'] < 5e-5 and found['shard'] == [2, 130, 128]
  assert found['three_images'] == 'xla'
