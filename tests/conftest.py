"""Fixtures and settings for all tests."""

import atexit
import contextlib
import os
import shutil
import tempfile

# Nearly all programs run once, on a few numbers: compiling takes most of the time. The environment
# hands this on to the processes that tests start.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

# What one test has compiled, the processes that others start need not compile again.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='farmer-tests-')
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402


@contextlib.contextmanager
def optimized():
  """What is compiled here runs often enough to be worth compiling well."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(scope='module', name='optimized')
def _optimized():
  return optimized


@pytest.fixture(scope='module')
def x64():
  """Double precision for a whole module; fixtures that make such arrays must ask for this one."""
  with jax.enable_x64(True):
    yield
