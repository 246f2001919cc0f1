"""Solving x = f(x) for a batch, where f is strictly triangular."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Solution:
  """What `solve` found."""

  x: jax.Array  # [B, n, d]
  aux: Any  # what `update` carries along
  residual: jax.Array  # [B], the largest change of the last round, relative to 1 + |x|; 0: exact
  rounds: jax.Array  # int [B], rounds that changed the example


def solve(update, x, aux, tolerance, rounds=None):  # x [B, n, d]
  """Jacobi iteration: x, aux ← update(x, aux), all n tokens at once, until nothing changes.

  Token i of the new x must depend on tokens of x before i alone. Then round k makes token k exact,
  and n rounds everything; usually far fewer leave changes within `tolerance`. An example that has
  converged stays as it is: its result does not depend on the rest of the batch.

  Args:
    update: x, aux -> x, aux.
    x: starting point.
    aux: arrays that rounds may leave results in; they must not matter for x.
    tolerance: largest change of an entry, relative to 1 + |x|, that counts as none.
    rounds: most rounds; None: as many as it takes.
  """
  batch, n = x.shape[:2]
  most = n if rounds is None else min(n, rounds)
  if n == 1:  # exact at once
    x, aux = update(x, aux)
    return Solution(x, aux, jnp.zeros(batch, x.dtype), jnp.ones(batch, jnp.int32))

  def active(solution):
    # What is not finite will not become so.
    return (solution.residual > tolerance) & jnp.isfinite(solution.x).all((1, 2))

  def go_on(carry):
    solution, count = carry
    return (count < most) & ((count == 0) | active(solution).any())

  def iterate(carry):
    old, count = carry
    changing = (count == 0) | active(old)
    new, aux = update(old.x, old.aux)
    change = (abs(new - old.x) / (1 + abs(new))).max((1, 2))
    solution = Solution(
      x=jnp.where(changing[:, None, None], new, old.x),
      aux=aux,
      residual=jnp.where(changing, change, old.residual),
      rounds=old.rounds + changing,
    )
    return solution, count + 1

  start = Solution(x, aux, jnp.full(batch, jnp.inf, x.dtype), jnp.zeros(batch, jnp.int32))
  found = jax.lax.while_loop(go_on, iterate, (start, 0))[0]
  # After n rounds the result is exact, whatever the last one changed.
  residual = jnp.where(found.rounds < n, found.residual, 0)
  return Solution(found.x, found.aux, residual, found.rounds)
