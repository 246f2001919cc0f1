"""Jacobi iteration for strictly triangular systems x = f(x)."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from farmer_jax.ops.arrays import PerImage


@flax.struct.dataclass
class Solution:
  """State and result of the iteration."""

  x: Float[Array, 'B n d']
  aux: PyTree  # second output of `update`
  residual: PerImage  # largest change in the last round, relative to 1 + |x|; 0: exact
  rounds: Int[Array, 'B']  # rounds that updated the example


def solve(
  update: Callable[[Array, PyTree], tuple[Array, PyTree]],
  x: Float[Array, 'B n d'],
  aux: PyTree,
  tolerance: float,
  max_rounds: int | None = None,
) -> Solution:
  """Iterates x, aux = update(x, aux) until x changes by no more than the tolerance.

  Token i of the new x may depend only on the tokens of x before i. Token k is then exact after
  round k, and all n tokens are exact after n rounds. Usually, far fewer rounds suffice. An example
  that has converged no longer changes, so its result does not depend on the other examples.

  `update` may write to the arrays `aux`, but the new x must not depend on their values. The
  tolerance limits the change of each entry relative to 1 + |x|. By default, `max_rounds` is n.
  """
  batch, n = x.shape[:2]
  limit = n if max_rounds is None else min(n, max_rounds)
  if n == 1:  # exact after one round
    x, aux = update(x, aux)
    return Solution(x, aux, jnp.zeros(batch, x.dtype), jnp.ones(batch, jnp.int32))

  def active(solution: Solution) -> Bool[Array, 'B']:
    # Values that are not finite cannot become finite.
    return (solution.residual > tolerance) & jnp.isfinite(solution.x).all((1, 2))

  def should_continue(carry: tuple[Solution, Array]) -> Bool[Array, '']:
    solution, count = carry
    return (count < limit) & ((count == 0) | active(solution).any())

  def iterate(carry: tuple[Solution, Array]) -> tuple[Solution, Array]:
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
  solution = jax.lax.while_loop(should_continue, iterate, (start, jnp.int32(0)))[0]
  # After n rounds the result is exact, even if the last round changed it.
  residual = jnp.where(solution.rounds < n, solution.residual, 0)
  return Solution(solution.x, solution.aux, residual, solution.rounds)
