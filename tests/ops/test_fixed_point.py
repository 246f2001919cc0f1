"""Jacobi iteration compared with a direct solution of triangular systems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax.ops import fixed_point

pytestmark = pytest.mark.usefixtures('x64')

N = 12


@pytest.fixture(scope='module')
def system(x64):
  """x = L x + c with L strictly lower triangular, three examples with increasing norms."""
  rng = np.random.default_rng(0)
  lower = np.tril(rng.normal(size=(3, N, N)), -1) * np.asarray([0.02, 0.2, 1.5])[:, None, None]
  constant = rng.normal(size=(3, N, 1))
  exact = np.linalg.solve(np.eye(N) - lower, constant)
  return jnp.asarray(lower), jnp.asarray(constant), exact


def solve(lower, constant, tolerance, start=None, max_rounds=None):
  def update(x, count):
    return lower @ x + constant, count + 1

  start, count = constant if start is None else start, jnp.zeros((), int)
  return jax.jit(lambda: fixed_point.solve(update, start, count, tolerance, max_rounds))()


def test_n_rounds_are_exact(system):
  lower, constant, exact = system
  found = solve(lower, constant, 0.0)
  np.testing.assert_allclose(found.x, exact, atol=1e-12)
  assert (np.asarray(found.rounds) <= N).all() and (np.asarray(found.residual) == 0).all()


def test_examples_stop_within_the_tolerance(system):
  """Each example has its own number of rounds, and its residual is its last change.

  The other examples of the batch have no effect.
  """
  lower, constant, exact = system
  found = solve(lower, constant, 1e-6)
  assert (abs(found.x - exact) < 1e-5).all()
  rounds = np.asarray(found.rounds)
  assert rounds[0] < rounds[1] < N
  for example, count in enumerate(rounds):
    x = np.asarray(constant[example])
    for _ in range(count):
      previous, x = x, np.asarray(lower[example] @ x + constant[example])
    np.testing.assert_allclose(found.x[example], x, atol=1e-13)
    change = (abs(x - previous) / (1 + abs(x))).max()
    if count < N:
      assert change <= 1e-6
      np.testing.assert_allclose(found.residual[example], change, rtol=1e-6)
    single = solve(lower[example : example + 1], constant[example : example + 1], 1e-6)
    np.testing.assert_allclose(found.x[example], single.x[0], atol=1e-14)
    assert count == single.rounds[0]
  assert int(found.aux) == rounds.max()


def test_closer_start_needs_fewer_rounds(system):
  lower, constant, exact = system
  near = exact + 1e-4 * np.random.default_rng(1).normal(size=exact.shape)
  close, far = (solve(lower, constant, 1e-6, start) for start in (jnp.asarray(near), constant))
  np.testing.assert_allclose(close.x, exact, atol=1e-5)
  assert (np.asarray(close.rounds[:2]) < np.asarray(far.rounds[:2])).all()
  assert (solve(lower, constant, 1e-6, jnp.asarray(exact)).rounds == 1).all()


@pytest.mark.parametrize('rounds', [1, 3])
def test_max_rounds(system, rounds):
  lower, constant, _ = system
  found, x = solve(lower, constant, 0.0, max_rounds=rounds), constant
  for _ in range(rounds):
    x = lower @ x + constant
  np.testing.assert_allclose(found.x, x, atol=1e-13)
  assert (found.rounds == rounds).all() and (found.residual > 0).all()


def test_nonfinite_example_stops(system):
  lower, constant, exact = system
  constant = constant.at[1, 3].set(jnp.nan)
  found = solve(lower, constant, 1e-6)
  np.testing.assert_allclose(found.x[0], exact[0], atol=1e-5)
  assert np.isnan(found.x[1, 3:]).all()
  assert found.rounds[1] == 1


def test_one_token_is_exact_after_one_round():
  found = fixed_point.solve(lambda x, _: (x * 0 + 7.0, None), jnp.ones((2, 1, 3)), None, 0.0)
  assert (found.x == 7).all() and (found.residual == 0).all() and (found.rounds == 1).all()
