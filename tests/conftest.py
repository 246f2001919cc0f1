"""Fixtures for all tests."""

import jax
import pytest


@pytest.fixture(scope='module')
def x64():
  """Double precision for a whole module; fixtures that make such arrays must ask for this one."""
  with jax.enable_x64(True):
    yield
