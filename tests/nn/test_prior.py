"""The prior: causality, its density in one piece with its samples, and its special cases."""

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
  """In NumPy: the leading axes of mixture and points broadcast."""
  scales = np.exp(parameters.log_scales)
  parts = stats.norm.logpdf(z[..., None, :], parameters.means, scales).sum(-1)
  return special.logsumexp(special.log_softmax(parameters.logits, axis=-1) + parts, axis=-1)


def depends_on(jacobian, mixture_axes, tokens_axis):
  """Which mixtures depend on which tokens, and which do not, exactly; over all their numbers."""
  axes = tuple(a for a in range(jacobian.ndim) if a not in (*mixture_axes, tokens_axis))
  return (jacobian != 0).any(axes), (jacobian == 0).all(axes)


@pytest.fixture(scope='module')
def model(x64):
  """A prior with a split, its parameters, data, mixtures, and their Jacobian for an example."""
  module = tiny.make_prior(
    tokens=N, channels=D, informative_channels=INFORMATIVE, layers=2, scale_floor=FLOOR
  )
  z = tiny.normals(3, N, D)
  params = tiny.filled_parameters(module, z, LABELS)

  @jax.jit
  def mixtures(informative, labels):
    return module.apply({'params': params}, informative, labels, method='mixtures')

  def one(informative, label):
    both = mixtures(informative[None], label[None])
    return jax.tree.map(lambda a: a[0], both)

  jacobian = jax.jit(jax.jacfwd(one))(split(z)[0][0], LABELS[0])

  def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)

  return module, params, z, as_numpy(mixtures(split(z)[0], LABELS)), as_numpy(jacobian), mixtures


def test_mixture_i_depends_on_exactly_the_tokens_before_i(model):
  token_jacobian, _ = model[4]
  strictly_causal = np.tril(np.ones((N, N), bool), -1)
  # [N, K, N, d_I] for the logits, [N, K, d_I, N, d_I] for means and scales.
  for leaf in jax.tree.leaves(token_jacobian):
    depends, independent = depends_on(leaf, (0,), leaf.ndim - 2)
    np.testing.assert_array_equal(depends, strictly_causal)
    np.testing.assert_array_equal(independent, ~strictly_causal)
    # Each number of the mixture depends on each channel of each earlier token.
    for i in range(1, N):
      assert (leaf[i][..., :i, :] != 0).all()


def test_shared_mixture_depends_on_all_informative_tokens(model):
  _, shared_jacobian = model[4]
  for leaf in jax.tree.leaves(shared_jacobian):  # [K, N, d_I] or [K, d_R, N, d_I]
    assert (leaf != 0).all()


def test_redundant_channels_condition_nothing(model):
  """Only their own density sees them, each token's by itself."""
  module, params, z, *_ = model
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


def test_every_mixture_knows_the_class(model):
  mixtures = model[5]
  informative = jnp.broadcast_to(split(model[2])[0][:1], (4, N, INFORMATIVE))
  token, shared = jax.tree.map(np.asarray, mixtures(informative, jnp.asarray([0, 1, 0, 3])))
  for leaf in jax.tree.leaves((token, shared)):
    np.testing.assert_allclose(leaf[0], leaf[2], atol=1e-12)
    for a, b in ((0, 1), (0, 3), (1, 3)):
      assert (leaf[a] != leaf[b]).all()


def test_density_is_that_of_the_mixtures(model):
  module, params, z, (token, shared), *_ = model
  log_informative, log_redundant = jax.jit(module.apply)({'params': params}, z, LABELS)
  informative, redundant = split(np.asarray(z))
  expected = mixture_log_prob(token, informative)
  np.testing.assert_allclose(log_informative, expected, rtol=1e-12)
  shared = jax.tree.map(lambda a: a[:, None], shared)  # the same for all tokens
  expected = mixture_log_prob(shared, redundant).sum(1)
  np.testing.assert_allclose(log_redundant, expected, rtol=1e-11)
  for parameters in (token, shared):
    assert (parameters.log_scales > np.log(FLOOR)).all()


def test_scale_floor_holds_where_the_head_asks_for_less(model):
  """Even a head that asks for e^-100 gets the floor, in every channel."""
  module, params, z, *_ = model
  heads = {
    name: jax.tree.map(lambda p: p * 0, params[name]) for name in params if name.endswith('_head')
  }
  for name, (k, d) in {'informative_head': (3, 2), 'redundant_head': (4, 1)}.items():
    heads[name]['out']['bias'] = heads[name]['out']['bias'].at[k * (1 + d) :].set(-100.0)
  changed = {'params': params | heads}
  mixtures = jax.jit(functools.partial(module.apply, method='mixtures'))
  for parameters in mixtures(changed, split(z)[0], LABELS):
    np.testing.assert_allclose(np.exp(parameters.log_scales), FLOOR, rtol=1e-6)


SAMPLED = {
  'split': dict(),
  'split, one condition copy, normal redundant channels': dict(
    redundant='normal', condition_copies=1
  ),
  'no split': dict(informative_channels=3, layers=2),
}


@pytest.mark.parametrize('changes', SAMPLED.values(), ids=SAMPLED)
def test_sampling_uses_the_mixtures_of_the_full_pass(changes):
  """With draws that are a fixed function of the mixture, samples must reproduce themselves."""
  module = tiny.make_prior(**changes)
  d = module.informative_channels
  params = {'params': tiny.filled_parameters(module, tiny.normals(3, N, D), LABELS)}

  class Fixed(sampling.Draws):
    """Draws that are a function of the mixture, no two alike."""

    def __init__(self):
      super().__init__(jax.random.split(jax.random.key(0), 3), None, 1.0, None)

    def token(self, mixtures, i):
      return of_mixture(mixtures)[0] + 0.1 * i

    def shared(self, mixtures, tokens):
      return of_mixture(mixtures)[0, :, None] + jnp.arange(tokens)[:, None]

  def of_mixture(parameters):
    z = parameters.means[..., 0, :] + jnp.exp(parameters.log_scales[..., -1, :])
    return z + jnp.sin(parameters.logits[..., 1, None])

  labels = jnp.stack([LABELS, LABELS[::-1]])  # the second row must not change the first
  z = jax.jit(lambda: module.apply(params, labels, Fixed(), method='sample'))()
  np.testing.assert_allclose(
    z, jax.jit(lambda: module.apply(params, labels[:1], Fixed(), method='sample'))(), atol=1e-11
  )
  assert z.shape == (3, N, D)
  mixtures = jax.jit(lambda z, labels: module.apply(params, z, labels, method='mixtures'))
  token, shared = mixtures(z[..., :d], LABELS)
  expected = of_mixture(token) + 0.1 * jnp.arange(N)[:, None]
  np.testing.assert_allclose(z[..., :d], expected, atol=1e-11)
  if shared is not None:
    expected = of_mixture(shared)[:, None] + jnp.arange(N)[:, None]
    np.testing.assert_allclose(z[..., d:], expected, atol=1e-11)
  else:
    assert abs(z[..., d:]).max(initial=0) < 6  # as standard normals are


def test_both_streams_of_guidance_read_the_same_tokens():
  """The mixtures of the second row are those that its labels give to the tokens drawn."""
  module = tiny.make_prior()
  params = {'params': tiny.filled_parameters(module, tiny.normals(3, N, D), LABELS)}
  labels = jnp.stack([LABELS, LABELS[::-1]])
  seen = []

  class Recorded(sampling.Draws):
    """Draws from the first row; remembers the second row's means."""

    def token(self, mixtures, i):
      jax.debug.callback(lambda means: seen.append(means), mixtures.means[1], ordered=True)
      return mixtures.means[0, :, 0] + mixtures.means[1, :, 1]

  draws = Recorded(jax.random.split(jax.random.key(0), 3), jnp.zeros(N), 1.0, config.Guidance())
  z = jax.jit(lambda: module.apply(params, labels, draws, method='sample'))()
  jax.effects_barrier()
  expected, _ = module.apply(params, z[..., :INFORMATIVE], labels[1], method='mixtures')
  np.testing.assert_allclose(np.stack(seen, 1), expected.means, atol=1e-11)


@pytest.mark.parametrize('redundant', ['mixture', 'normal'])
def test_samples_follow_the_density(redundant):
  """Each channel's conditional distribution function turns samples into independent uniforms."""
  count, tokens = 20000, 2
  module = tiny.make_prior(tokens=tokens, channels=2, informative_channels=1, redundant=redundant)
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
  if redundant == 'mixture':
    uniforms.append(cdf(jax.tree.map(lambda a: a[:, None], shared), z[..., 1]))
  else:
    uniforms.append(stats.norm.cdf(z[..., 1]))
  uniforms = np.concatenate(uniforms, axis=1)  # [count, 2 · tokens]
  for column in uniforms.T:
    assert stats.kstest(column, 'uniform').pvalue > 1e-3
  limit = 4.5 / count**0.5
  for centred in (uniforms - 0.5, (uniforms - 0.5) ** 2):
    assert abs(np.corrcoef(centred.T) - np.eye(2 * tokens)).max() < limit


def test_one_gaussian_is_one_more_flow_block():
  """K = 1 without a split: an affine autoregressive block in front of standard normals.

  Its first token is a constant standing for the class, on which the block, as always, does not act.
  """
  tokens, channels, label = 3, 2, 1
  module = tiny.make_prior(
    tokens=tokens,
    channels=channels,
    informative_channels=channels,
    components=1,
    condition_copies=1,
    scale_floor=0.0,
    layers=2,
  )
  block = tiny.make_block(tokens=tokens + 1, channels=channels, layers=2)
  z, labels = tiny.normals(5, tokens, channels), jnp.full((5,), label)
  params = tiny.filled_parameters(module, z, labels)
  embedding = params['class_embedding']['embedding'][label] - params['in_proj']['bias']
  head = params['informative_head']['out']
  block_params = {
    'in_proj': params['in_proj'],
    'positions': params['positions'][:tokens].at[0].add(embedding),
    'transformer': params['transformer'],
    # Of a single component the logit says nothing; shift and log-scale are its mean and log-scale.
    'out_proj': {'kernel': head['kernel'][:, 1:], 'bias': head['bias'][1:]},
  }
  with_first = jnp.concatenate([jnp.zeros((5, 1, channels)), z], axis=1)
  noise, log_det = jax.jit(block.apply)({'params': block_params}, with_first, None)
  noise = np.asarray(noise)[:, ::-1][:, 1:]
  expected = stats.norm.logpdf(noise).sum((1, 2)) + log_det
  log_informative, log_redundant = jax.jit(module.apply)({'params': params}, z, labels)
  np.testing.assert_allclose(log_informative.sum(1), expected, rtol=1e-12)
  assert (np.asarray(log_redundant) == 0).all()


def test_normal_prior():
  module = prior.NormalPrior(tokens=N, channels=D, dtype=jnp.dtype('float64'))
  z = tiny.normals(3, N, D)
  log_informative, log_redundant = module.apply({}, z, LABELS)
  np.testing.assert_allclose(log_informative, stats.norm.logpdf(z).sum(2), rtol=1e-12)
  assert (log_redundant == 0).all()
  draws = module.apply({}, jnp.zeros((1, 2000), int), tiny.make_draws(0, 2000, N), method='sample')
  assert draws.shape == (2000, N, D) and draws.dtype == jnp.float64
  assert stats.kstest(np.ravel(draws), 'norm').pvalue > 1e-3
