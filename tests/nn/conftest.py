"""Fixtures for the tests of modules."""

import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  """These programs run once, on a few numbers: compiling takes nearly all of the time."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', before)
