"""The prior: causality, its density, its samples and its special cases."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from farmer_jax import config
from farmer_jax.nn import prior
from farmer_jax.ops import guidance
from tests.support import models as tiny

pytestmark = pytest.mark.usefixtures('x64')

N, D, INFORMATIVE, FLOOR = 4, 3, 2, 1e-3
LABELS = jnp.asarray([0, 2, 3], jnp.int32)  # 3: no class


def split(z):
  return z[..., :INFORMATIVE], z[..., INFORMATIVE:]


@pytest.fixture(scope='module')
def z(x64):
  return tiny.normals(3, N, D)


@pytest.fixture(scope='module')
def model(z):
  """A prior with redundant channels."""
  module = tiny.make_prior(N, D, informative_channels=INFORMATIVE, layers=2, scale_floor=FLOOR)
  return tiny.Compiled(module, z, LABELS)


def test_mixtures_depend_on_earlier_tokens_and_shared_mixtures_on_all_tokens(model, z):
  """All parameters depend on all channels of these tokens. Other derivatives are zero."""

  def one(informative):
    both = model('mixtures')(informative[None], LABELS[:1])
    return jax.tree.map(lambda a: a[0], both)

  jacobians = jax.tree.map(np.asarray, jax.jit(jax.jacfwd(one))(split(z)[0][0]))
  earlier = np.tril(np.ones((N, N), bool), -1)
  # [N, K, N, d_I] for the logits, [N, K, d_I, N, d_I] for means and log-scales.
  for leaf in jax.tree.leaves(jacobians[0]):
    axes = tuple(axis for axis in range(leaf.ndim) if axis not in (0, leaf.ndim - 2))
    np.testing.assert_array_equal((leaf != 0).all(axes), earlier)
    np.testing.assert_array_equal((leaf == 0).all(axes), ~earlier)
  for leaf in jax.tree.leaves(jacobians[1]):  # [K, N, d_I] or [K, d_R, N, d_I]
    assert (leaf != 0).all()


def test_redundant_channels_are_independent_of_each_other(model, z):
  """Redundant channels change only their own density, independently for each token."""
  informative, redundant = split(z[0])

  @jax.jit
  @jax.jacfwd
  def derivatives(redundant):
    return model()(jnp.concatenate([informative, redundant], axis=-1)[None], LABELS[:1])

  of_informative, of_redundant = derivatives(redundant)
  assert (of_informative == 0).all()
  assert (abs(of_redundant) > 1e-6).all()
  _, moved = derivatives(redundant.at[1].add(1.0))
  assert abs(moved - of_redundant)[0, 1].min() > 1e-3
  np.testing.assert_allclose(moved[0, [0, 2, 3]], of_redundant[0, [0, 2, 3]], atol=1e-12)


def test_all_mixtures_depend_on_the_class(model, z):
  informative = jnp.broadcast_to(split(z)[0][:1], (4, N, INFORMATIVE))
  for leaf in jax.tree.leaves(model('mixtures')(informative, jnp.asarray([0, 1, 0, 3]))):
    np.testing.assert_allclose(leaf[0], leaf[2], atol=1e-12)
    for a, b in ((0, 1), (0, 3), (1, 3)):
      assert (leaf[a] != leaf[b]).all()


def test_chunks_of_tokens_change_nothing(z, monkeypatch):
  """Rematerialization computes the mixtures of two tokens at a time, with equal initial values."""

  def value_and_gradient(module, params):
    def loss(params, z):
      tokens, redundant = module.apply({'params': params}, z, LABELS)
      return (tokens**2).sum() + (redundant**2).sum(), tokens

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, z)

  modules = [tiny.make_prior(N, D, informative_channels=2, remat=r) for r in ('none', 'layers')]
  params = tiny.filled_parameters(modules[0], z, LABELS)
  expected = value_and_gradient(modules[0], params)
  monkeypatch.setattr(prior, '_CHUNK_TOKENS', 3)
  assert ' scan[' in str(jax.make_jaxpr(modules[1].apply)({'params': params}, z, LABELS))
  close = functools.partial(np.testing.assert_allclose, atol=1e-12)
  jax.tree.map(close, value_and_gradient(modules[1], params), expected)
  initial = [nn.unbox(jax.jit(m.init)(jax.random.key(0), z, LABELS)) for m in modules]
  jax.tree.map(np.testing.assert_array_equal, *initial)


def test_density_equals_that_of_the_mixtures(model, z):
  log_informative, log_redundant = model()(z, LABELS)
  informative, redundant = split(np.asarray(z))
  token, shared = model('mixtures')(split(z)[0], LABELS)
  expected = tiny.mixture_log_prob(token, informative)
  np.testing.assert_allclose(log_informative, expected, rtol=1e-12)
  per_token = jax.tree.map(lambda a: a[:, None], shared)
  expected = tiny.mixture_log_prob(per_token, redundant).sum(1)
  np.testing.assert_allclose(log_redundant, expected, rtol=1e-11)
  for parameters in (token, shared):
    assert (parameters.log_scales > np.log(FLOOR)).all()


def test_scale_floor(model, z):
  """Heads with log-scales of -100 give the floor in every channel."""
  params = dict(model.params)
  for name in ('informative_head', 'redundant_head'):
    params[name] = jax.tree.map(jnp.zeros_like, params[name])
    params[name]['log_scales']['bias'] -= 100.0
  for parameters in model('mixtures', params)(split(z)[0], LABELS):
    np.testing.assert_allclose(np.exp(parameters.log_scales), FLOOR, rtol=1e-6)


SAMPLED = {
  'redundant mixture': dict(),
  'one condition copy': dict(redundant_kind='normal', condition_copies=1, neighborhood=True),
  'no redundant channels': dict(informative_channels=3, layers=2),
}


@pytest.mark.parametrize(
  'name', [*list(SAMPLED)[:2], pytest.param(list(SAMPLED)[2], marks=pytest.mark.slow)]
)
def test_sampling_uses_the_mixtures_of_the_full_pass(name, z):
  """The draws are a function of the mixtures. The full pass gives the same mixtures and draws."""
  model = tiny.Compiled(tiny.make_prior(N, D, **SAMPLED[name]), z, LABELS)
  d = model.module.informative_channels

  class FixedDraws(guidance.GuidedDraws):
    """Draws that are a function of the mixtures and of the token."""

    def __init__(self):
      keys = jax.random.split(jax.random.key(0), 3)
      super().__init__(keys, jnp.zeros(N), 1.0, config.Guidance())

    def token(self, mixtures, i):
      return of_mixture(mixtures)[0] + 0.1 * i, None

    def shared(self, mixtures, num_tokens):
      return of_mixture(mixtures)[0, :, None] + jnp.arange(num_tokens)[:, None], None

  def of_mixture(parameters):
    z = parameters.means[..., 0, :] + jnp.exp(parameters.log_scales[..., -1, :])
    return z + jnp.sin(parameters.logits[..., 1, None])

  @jax.jit
  def sample(labels):
    return model.apply(labels, FixedDraws(), method='sample')[0]

  z = sample(jnp.stack([LABELS, LABELS[::-1]]))  # the second stream must not affect the first
  np.testing.assert_allclose(z, sample(LABELS[None]), atol=1e-11)
  assert z.shape == (3, N, D)
  token, shared = model('mixtures')(z[..., :d], LABELS)
  expected = of_mixture(token) + 0.1 * jnp.arange(N)[:, None]
  np.testing.assert_allclose(z[..., :d], expected, atol=1e-11)
  if shared is not None:
    expected = of_mixture(shared)[:, None] + jnp.arange(N)[:, None]
    np.testing.assert_allclose(z[..., d:], expected, atol=1e-11)
  else:
    assert abs(z[..., d:]).max(initial=0) < 6  # standard normal


def test_all_streams_read_the_same_tokens(model):
  """The mixtures of the second stream equal the mixtures for its labels and the drawn tokens."""
  labels = jnp.stack([LABELS, LABELS[::-1]])
  seen = []

  class RecordedDraws(guidance.GuidedDraws):
    """Draws from both streams, and records the means of the second stream."""

    def token(self, mixtures, i):
      jax.debug.callback(lambda means: seen.append(means), mixtures.means[1], ordered=True)
      return mixtures.means[0, :, 0] + mixtures.means[1, :, 1], None

  keys = jax.random.split(jax.random.key(0), 3)
  draws = RecordedDraws(keys, jnp.zeros(N), 1.0, config.Guidance())
  z, _ = jax.jit(lambda: model.apply(labels, draws, method='sample'))()
  jax.effects_barrier()
  expected, _ = model('mixtures')(z[..., :INFORMATIVE], labels[1])
  np.testing.assert_allclose(np.stack(seen, 1), expected.means, atol=1e-11)


@pytest.mark.parametrize('redundant_kind', ['mixture', 'normal'])
def test_samples_follow_the_density(redundant_kind):
  """The conditional CDFs of the channels map samples to independent uniform values."""
  count, tokens = 20_000, 2
  module = tiny.make_prior(tokens, 2, informative_channels=1, redundant_kind=redundant_kind)
  labels = jnp.full((count,), 1)
  model = tiny.Compiled(module, tiny.normals(1, tokens, 2), labels[:1], seed=3)

  @jax.jit
  def draw():
    z, _ = model.apply(labels[None], tiny.make_draws(0, count, tokens), method='sample')
    return z, model('mixtures')(z[..., :1], labels)

  z, (token, shared) = jax.tree.map(np.asarray, draw())

  if redundant_kind == 'mixture':
    redundant = tiny.mixture_cdf(jax.tree.map(lambda a: a[:, None], shared), z[..., 1])
  else:
    redundant = stats.norm.cdf(z[..., 1])
  informative = tiny.mixture_cdf(token, z[..., 0])
  uniforms = np.concatenate([informative, redundant], axis=1)  # [count, 2 · tokens]
  for column in uniforms.T:
    assert stats.kstest(column, 'uniform').pvalue > 1e-3
  limit = 4.5 / count**0.5
  for centered in (uniforms - 0.5, (uniforms - 0.5) ** 2):
    assert abs(np.corrcoef(centered.T) - np.eye(2 * tokens)).max() < limit


def test_single_gaussians_equal_one_more_flow_block():
  """With K = 1 and no redundant channels, the prior equals a flow block and a standard normal.

  The first token of the block is a constant that represents the class. It stays unchanged.
  """
  tokens, channels, label = 3, 2, 1
  changes = dict(components=1, condition_copies=1, scale_floor=0.0, layers=2)
  module = tiny.make_prior(tokens, channels, informative_channels=channels, **changes)
  block = tiny.make_block(tokens + 1, channels, layers=2)
  z, labels = tiny.normals(5, tokens, channels), jnp.full((5,), label)
  model = tiny.Compiled(module, z, labels)
  params = model.params
  embedding = params['class_embedding']['embedding'][label] - params['in_proj']['bias']
  head = params['informative_head']
  block_params = {
    'in_proj': params['in_proj'],
    'positions': params['positions'][:tokens].at[0].add(embedding),
    'transformer': params['transformer'],
    'norm': head['norm'],
    'shift_proj': head['means'],
    'log_scale_proj': head['log_scales'],
  }
  with_first = jnp.concatenate([jnp.zeros((5, 1, channels)), z], axis=1)
  noise, log_det = jax.jit(block.apply)({'params': block_params}, with_first, None)
  noise = np.asarray(noise)[:, ::-1][:, 1:]
  expected = stats.norm.logpdf(noise).sum((1, 2)) + log_det
  log_informative, log_redundant = model()(z, labels)
  np.testing.assert_allclose(log_informative.sum(1), expected, rtol=1e-12)
  assert (np.asarray(log_redundant) == 0).all()
