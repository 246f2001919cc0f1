"""The prior: causality, its density, its samples and its special cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from farmer_jax import config, sampling
from farmer_jax.nn import prior
from tests.support import models as tiny

pytestmark = pytest.mark.usefixtures('x64')

N, D, INFORMATIVE, FLOOR = 4, 3, 2, 1e-3
LABELS = jnp.asarray([0, 2, 3], jnp.int32)  # 3: no class


def split(z):
  return z[..., :INFORMATIVE], z[..., INFORMATIVE:]


def mixture_log_prob(parameters, z):
  """Computes the log-density in NumPy. Leading axes of mixtures and points broadcast."""
  scales = np.exp(parameters.log_scales)
  parts = stats.norm.logpdf(z[..., None, :], parameters.means, scales).sum(-1)
  return special.logsumexp(special.log_softmax(parameters.logits, axis=-1) + parts, axis=-1)


@pytest.fixture(scope='module')
def model(x64):
  """A prior with redundant channels, its parameters, data, and a compiled `mixtures`."""
  module = tiny.make_prior(N, D, informative_channels=INFORMATIVE, layers=2, scale_floor=FLOOR)
  z = tiny.normals(3, N, D)
  params = tiny.filled_parameters(module, z, LABELS)
  mixtures = jax.jit(functools.partial(module.apply, method='mixtures'))
  return module, params, z, functools.partial(mixtures, {'params': params})


@pytest.fixture(scope='module')
def jacobians(model):
  """Jacobians of the mixtures of one example with respect to the informative channels."""
  _, _, z, mixtures = model

  def one(informative):
    both = mixtures(informative[None], LABELS[:1])
    return jax.tree.map(lambda a: a[0], both)

  return jax.tree.map(np.asarray, jax.jit(jax.jacfwd(one))(split(z)[0][0]))


def test_mixture_of_a_token_depends_on_the_earlier_tokens(jacobians):
  """All mixture parameters depend on all channels of all earlier tokens, and on no other token."""
  earlier = np.tril(np.ones((N, N), bool), -1)
  # [N, K, N, d_I] for the logits, [N, K, d_I, N, d_I] for means and log-scales.
  for leaf in jax.tree.leaves(jacobians[0]):
    axes = tuple(axis for axis in range(leaf.ndim) if axis not in (0, leaf.ndim - 2))
    np.testing.assert_array_equal((leaf != 0).all(axes), earlier)
    np.testing.assert_array_equal((leaf == 0).all(axes), ~earlier)


def test_shared_mixture_depends_on_all_informative_channels(jacobians):
  for leaf in jax.tree.leaves(jacobians[1]):  # [K, N, d_I] or [K, d_R, N, d_I]
    assert (leaf != 0).all()


def test_redundant_channels_are_independent_of_each_other(model):
  """Redundant channels change only their own density, independently for each token."""
  module, params, z, _ = model
  informative, redundant = split(z[0])

  @jax.jit
  @jax.jacfwd
  def derivatives(redundant):
    z = jnp.concatenate([informative, redundant], axis=-1)
    return module.apply({'params': params}, z[None], LABELS[:1])

  of_informative, of_redundant = derivatives(redundant)
  assert (of_informative == 0).all()
  assert (abs(of_redundant) > 1e-6).all()
  _, moved = derivatives(redundant.at[1].add(1.0))
  assert abs(moved - of_redundant)[0, 1].min() > 1e-3
  np.testing.assert_allclose(moved[0, [0, 2, 3]], of_redundant[0, [0, 2, 3]], atol=1e-12)


def test_all_mixtures_depend_on_the_class(model):
  _, _, z, mixtures = model
  informative = jnp.broadcast_to(split(z)[0][:1], (4, N, INFORMATIVE))
  for leaf in jax.tree.leaves(mixtures(informative, jnp.asarray([0, 1, 0, 3]))):
    np.testing.assert_allclose(leaf[0], leaf[2], atol=1e-12)
    for a, b in ((0, 1), (0, 3), (1, 3)):
      assert (leaf[a] != leaf[b]).all()


def test_density_equals_that_of_the_mixtures(model):
  module, params, z, mixtures = model
  log_informative, log_redundant = jax.jit(module.apply)({'params': params}, z, LABELS)
  informative, redundant = split(np.asarray(z))
  token, shared = mixtures(split(z)[0], LABELS)
  np.testing.assert_allclose(log_informative, mixture_log_prob(token, informative), rtol=1e-12)
  per_token = jax.tree.map(lambda a: a[:, None], shared)
  expected = mixture_log_prob(per_token, redundant).sum(1)
  np.testing.assert_allclose(log_redundant, expected, rtol=1e-11)
  for parameters in (token, shared):
    assert (parameters.log_scales > np.log(FLOOR)).all()


def test_scale_floor(model):
  """Heads with log-scales of -100 give the floor in every channel."""
  module, params, z, _ = model
  heads = {
    name: jax.tree.map(lambda p: p * 0, params[name]) for name in params if name.endswith('_head')
  }
  for head in heads.values():
    head['log_scales']['bias'] -= 100.0
  mixtures = jax.jit(functools.partial(module.apply, method='mixtures'))
  for parameters in mixtures({'params': params | heads}, split(z)[0], LABELS):
    np.testing.assert_allclose(np.exp(parameters.log_scales), FLOOR, rtol=1e-6)


SAMPLED = {
  'redundant mixture': dict(),
  'normal redundant channels, one condition copy': dict(
    redundant_kind='normal', condition_copies=1
  ),
}
SLOW_SAMPLED = {'no redundant channels': dict(informative_channels=3, layers=2)}


@pytest.mark.parametrize(
  'name', [*SAMPLED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_SAMPLED)]
)
def test_sampling_uses_the_mixtures_of_the_full_pass(name):
  """The draws are a function of the mixtures. The full pass gives the same mixtures and draws."""
  module = tiny.make_prior(N, D, **(SAMPLED | SLOW_SAMPLED)[name])
  d = module.informative_channels
  params = {'params': tiny.filled_parameters(module, tiny.normals(3, N, D), LABELS)}

  class FixedDraws(sampling.GuidedDraws):
    """Draws that are a function of the mixtures and of the token."""

    def __init__(self):
      keys = jax.random.split(jax.random.key(0), 3)
      super().__init__(keys, jnp.zeros(N), 1.0, config.Guidance())

    def token(self, mixtures, i):
      return of_mixture(mixtures)[0] + 0.1 * i

    def shared(self, mixtures, num_tokens):
      return of_mixture(mixtures)[0, :, None] + jnp.arange(num_tokens)[:, None]

  def of_mixture(parameters):
    z = parameters.means[..., 0, :] + jnp.exp(parameters.log_scales[..., -1, :])
    return z + jnp.sin(parameters.logits[..., 1, None])

  sample = jax.jit(lambda labels: module.apply(params, labels, FixedDraws(), method='sample'))
  z = sample(jnp.stack([LABELS, LABELS[::-1]]))  # the second stream must not affect the first
  np.testing.assert_allclose(z, sample(LABELS[None]), atol=1e-11)
  assert z.shape == (3, N, D)
  mixtures = jax.jit(lambda z, labels: module.apply(params, z, labels, method='mixtures'))
  token, shared = mixtures(z[..., :d], LABELS)
  expected = of_mixture(token) + 0.1 * jnp.arange(N)[:, None]
  np.testing.assert_allclose(z[..., :d], expected, atol=1e-11)
  if shared is not None:
    expected = of_mixture(shared)[:, None] + jnp.arange(N)[:, None]
    np.testing.assert_allclose(z[..., d:], expected, atol=1e-11)
  else:
    assert abs(z[..., d:]).max(initial=0) < 6  # standard normal


def test_all_streams_read_the_same_tokens(model):
  """The mixtures of the second stream equal the mixtures for its labels and the drawn tokens."""
  module, params, _, mixtures = model
  labels = jnp.stack([LABELS, LABELS[::-1]])
  seen = []

  class RecordedDraws(sampling.GuidedDraws):
    """Draws from both streams, and records the means of the second stream."""

    def token(self, mixtures, i):
      jax.debug.callback(lambda means: seen.append(means), mixtures.means[1], ordered=True)
      return mixtures.means[0, :, 0] + mixtures.means[1, :, 1]

  keys = jax.random.split(jax.random.key(0), 3)
  draws = RecordedDraws(keys, jnp.zeros(N), 1.0, config.Guidance())
  z = jax.jit(lambda: module.apply({'params': params}, labels, draws, method='sample'))()
  jax.effects_barrier()
  expected, _ = mixtures(z[..., :INFORMATIVE], labels[1])
  np.testing.assert_allclose(np.stack(seen, 1), expected.means, atol=1e-11)


@pytest.mark.parametrize('redundant_kind', ['mixture', 'normal'])
def test_samples_follow_the_density(redundant_kind):
  """The conditional CDFs of the channels map samples to independent uniform values."""
  count, tokens = 20_000, 2
  module = tiny.make_prior(tokens, 2, informative_channels=1, redundant_kind=redundant_kind)
  labels = jnp.full((count,), 1)
  example = tiny.normals(1, tokens, 2)
  params = {'params': tiny.filled_parameters(module, example, labels[:1], seed=3)}

  @jax.jit
  def draw():
    z = module.apply(params, labels[None], tiny.make_draws(0, count, tokens), method='sample')
    return z, module.apply(params, z[..., :1], labels, method='mixtures')

  z, (token, shared) = jax.tree.map(np.asarray, draw())

  def cdf(parameters, z):  # [..., K, 1], [...]
    means, log_scales = parameters.means[..., 0], parameters.log_scales[..., 0]
    parts = stats.norm.cdf(z[..., None], means, np.exp(log_scales))
    return (parts * special.softmax(parameters.logits, axis=-1)).sum(-1)

  uniforms = [cdf(token, z[..., 0])]
  if redundant_kind == 'mixture':
    uniforms.append(cdf(jax.tree.map(lambda a: a[:, None], shared), z[..., 1]))
  else:
    uniforms.append(stats.norm.cdf(z[..., 1]))
  uniforms = np.concatenate(uniforms, axis=1)  # [count, 2 · tokens]
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
  params = tiny.filled_parameters(module, z, labels)
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
  log_informative, log_redundant = jax.jit(module.apply)({'params': params}, z, labels)
  np.testing.assert_allclose(log_informative.sum(1), expected, rtol=1e-12)
  assert (np.asarray(log_redundant) == 0).all()


def test_normal_prior():
  module = prior.NormalPrior(N, D, jnp.dtype('float64'))
  z = tiny.normals(3, N, D)
  log_informative, log_redundant = module.apply({}, z, LABELS)
  np.testing.assert_allclose(log_informative, stats.norm.logpdf(z).sum(2), rtol=1e-12)
  assert (log_redundant == 0).all()
  draws = module.apply({}, jnp.zeros((1, 2000), int), tiny.make_draws(0, 2000, N), method='sample')
  assert draws.shape == (2000, N, D) and draws.dtype == jnp.float64
  assert stats.kstest(np.ravel(draws), 'norm').pvalue > 1e-3
