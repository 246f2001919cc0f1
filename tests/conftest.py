"""Fixtures and settings for all tests."""

import atexit
import contextlib
import importlib.metadata
import os
import pathlib
import shutil
import signal
import tempfile

# Most programs run once, on small arrays, so that compilation takes most of the time. Processes
# that tests start inherit the environment, and share the compiled programs.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
# Without MLIR for each fusion, large programs compile in about half of the time. XLA stops at flags
# that it does not know, and newer versions do not know this one.
_FLAGS = '--xla_cpu_use_fusion_emitters=false'
_KNOWN = importlib.metadata.version('jaxlib').startswith('0.10.')
if _KNOWN and _FLAGS not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{_FLAGS} {os.environ.get("XLA_FLAGS", "")}'.strip()
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='farmer-tests-')
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)

# A shell starts background processes with these signals ignored. Processes that tests start would
# ignore them, too.
for _number, _handler in (
  (signal.SIGINT, signal.default_int_handler),
  (signal.SIGHUP, signal.SIG_DFL),
):
  if signal.getsignal(_number) is signal.SIG_IGN:
    signal.signal(_number, _handler)

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.support import shape_checks  # noqa: E402

shape_checks.install()

# Files whose tests take longest. They start first, so that all processes end at the same time.
_LONG = (
  'jobs/test_distill.py',
  'nn/test_scaling.py',
  'evaluation/test_training_fidelity.py',
  'training/test_start.py',
  'training/test_loop.py',
  'training/test_extension.py',
  'jobs/test_export.py',
  'jobs/test_sample.py',
  'ops/test_guidance.py',
)


def pytest_collection_modifyitems(items):
  folder = pathlib.Path(__file__).parent
  places = {folder / name: place for place, name in enumerate(_LONG)}
  items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope='module')
def optimized():
  """A context in which programs that run often are compiled with optimizations."""

  @contextlib.contextmanager
  def enable_optimizations():
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', before)

  return enable_optimizations


@pytest.fixture(scope='module')
def x64():
  """Double precision for a module. Fixtures that create float64 arrays must request this one."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """The workdir of a tiny run, which tests must not change."""
  from tests.support import runs

  return runs.save_run(tmp_path_factory.mktemp('trained') / 'run')


@pytest.fixture
def run(trained, workdir):
  """The workdir of a copy of the tiny run, which a test may change."""
  return shutil.copytree(trained, workdir)


@pytest.fixture
def workdir(tmp_path):
  return tmp_path / 'run'


@pytest.fixture(scope='session')
def uninterrupted(tmp_path_factory):
  """The workdir of a run of `processes.train`, which tests must not change."""
  from tests.support import processes

  workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
  processes.train(workdir, devices=1).finish()
  return workdir
