"""A run of one process that is never interrupted."""

import pytest

from tests.support import processes


@pytest.fixture(scope='session')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
  processes.train(workdir, devices=1).finish()
  return workdir
