"""Helpers that inspect jaxprs."""

import jax


def equations(jaxpr):
  """Yields all equations of a jaxpr, including nested jaxprs such as the bodies of loops."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.core.jaxprs_in_params(equation.params):
      yield from equations(inner)
