"""Makes small models and runs of other folders known here, and one run that nothing happens to."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'nn'))
sys.path.append(str(pathlib.Path(__file__).parents[1] / 'jobs'))


@pytest.fixture(scope='session', name='whole')
def _whole(tmp_path_factory):
  """The workdir of a run of one process that nothing happens to."""
  from test_kills import processes

  workdir = tmp_path_factory.mktemp('whole') / 'run'
  processes.finish(processes.train(workdir, devices=1), workdir)
  return workdir
