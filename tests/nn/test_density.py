"""The density of flow and prior integrates to one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from farmer_jax.nn import coupling, flow
from tests.support import models as tiny

pytestmark = pytest.mark.usefixtures('x64')


@functools.cache
def make(num_tokens, channels, blocks=0, flow_class=flow.Flow, **prior_changes):
  """Returns a compiled function from points [n, N, d] to their log-density terms, [n] each."""
  example = tiny.normals(1, num_tokens, channels), jnp.asarray([1], jnp.int32)
  prior = tiny.Compiled(tiny.make_prior(num_tokens, channels, **prior_changes), *example, seed=1)
  if blocks:
    module = tiny.make_flow(num_tokens, channels, flow_class=flow_class, blocks=blocks)
    bijection = tiny.Compiled(module, *example, seed=2)

  @jax.jit
  def evaluate(x):
    labels = jnp.full(len(x), 1, jnp.int32)
    z, log_dets = bijection.apply(x, labels) if blocks else (x, jnp.zeros((1, len(x))))
    tokens, redundant = prior.apply(z, labels)
    return tokens.sum(1), redundant, log_dets.sum(0)

  return evaluate


def quadrature(density, shape, points):
  """Integrates over the plane with the trapezoid rule.

  The rule converges exponentially for functions that vanish at both ends. x = sinh(t) puts the ends
  at ±50 and most points near zero.
  """
  t = np.linspace(-4.6, 4.6, points)
  grid, weights = np.sinh(t), np.cosh(t) * (t[1] - t[0])
  x = np.stack(np.meshgrid(grid, grid, indexing='ij'), axis=-1).reshape(-1, *shape)
  return weights @ np.asarray(density(x)).reshape(points, points) @ weights


COUPLING = dict(flow_class=coupling.CouplingFlow)
CASES = {
  'two tokens': dict(num_tokens=2, channels=1, informative_channels=1),
  'redundant mixture': dict(num_tokens=1, channels=2, informative_channels=1),
  'one token': dict(num_tokens=1, channels=2, informative_channels=2),
  'flow': dict(num_tokens=2, channels=1, informative_channels=1, blocks=2),
  'coupling flow': COUPLING | dict(num_tokens=1, channels=2, informative_channels=1, blocks=2),
}


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_integral_over_the_plane(case):
  evaluate = make(**case)
  shape = (case['num_tokens'], case['channels'])
  total = quadrature(lambda x: np.exp(sum(map(np.asarray, evaluate(x)))), shape, 281)
  assert total == pytest.approx(1, abs=1e-5)


REDUNDANT = dict(num_tokens=2, channels=2, informative_channels=1)


@pytest.mark.parametrize('informative', [(-0.5, 1.0), (2.0, -1.0)])
def test_redundant_density_given_the_informative_channels_integrates_to_one(informative):
  evaluate = make(**REDUNDANT)

  def density(redundant):
    x = np.stack([np.broadcast_to(informative, redundant.shape), redundant], axis=-1)
    return np.exp(np.asarray(evaluate(x)[1]))

  assert quadrature(density, (2,), 201) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
  'case',
  [
    dict(num_tokens=3, channels=1, informative_channels=1, blocks=3),
    REDUNDANT | dict(blocks=2),
    REDUNDANT | dict(blocks=2, redundant_kind='normal'),
    REDUNDANT | COUPLING | dict(blocks=2),
    COUPLING | dict(num_tokens=1, channels=3, informative_channels=2, blocks=3),
  ],
)
def test_integral_over_three_and_four_dimensions(case):
  """Importance sampling from a heavy-tailed density with quasi-Monte-Carlo. Error: about 5e-4."""
  evaluate, dims = make(**case), case['num_tokens'] * case['channels']
  proposal = stats.t(df=3, scale=1.5)
  x = proposal.ppf(stats.qmc.Sobol(dims, rng=0).random_base2(16))
  log_density = sum(map(np.asarray, evaluate(x.reshape(-1, case['num_tokens'], case['channels']))))
  ratio = np.exp(log_density - proposal.logpdf(x).sum(1))
  assert ratio.mean() == pytest.approx(1, abs=3e-3)
