"""A run of one process that nothing happens to."""

import pytest

from tests.support import processes


@pytest.fixture(scope='session', name='whole')
def _whole(tmp_path_factory):
  """The workdir of a run of one process that nothing happens to."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  processes.finish(processes.train(workdir, devices=1), workdir)
  return workdir
