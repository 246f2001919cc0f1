"""A run with three checkpoints, saved once."""

import shutil

import pytest

from tests.support import checkpoints


@pytest.fixture(scope='session')
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('saved') / 'run'
  checkpoints.save(workdir)
  return workdir


@pytest.fixture
def run(saved, tmp_path):
  """A copy of the run, which the test may change."""
  shutil.copytree(saved, tmp_path / 'run')
  return tmp_path / 'run'
