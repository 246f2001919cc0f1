"""The tiny run, trained once."""

import shutil

import pytest

from farmer_jax.jobs import pretrain
from tests.support import runs as tiny_run


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  pretrain.run(tiny_run.CONFIG, workdir)
  return workdir


@pytest.fixture
def run(trained, tmp_path):
  """A copy of the run, for each test to write to."""
  shutil.copytree(trained, tmp_path / 'run')
  return tmp_path / 'run'
