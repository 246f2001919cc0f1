"""Helpers that inspect jaxprs."""

from jax.extend import core


def equations(jaxpr):
  """Yields all equations of a jaxpr, including nested jaxprs such as the bodies of loops."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in core.jaxprs_in_params(equation.params):
      yield from equations(inner)
