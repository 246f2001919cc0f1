"""One run per workdir. A lock of a killed process: tests/faults/test_preemption.py."""

import errno
import fcntl
import os
from unittest import mock

import pytest
from etils import epath

from farmer_jax import errors
from farmer_jax.workdir import lock


def test_second_run_is_refused_until_the_first_ends(tmp_path):
  workdir = epath.Path(tmp_path)
  with lock.hold(workdir):
    with pytest.raises(errors.WorkdirError, match=f'process {os.getpid()} on .*{tmp_path}'):
      lock.hold(workdir).__enter__()
    with lock.hold(epath.Path(tmp_path.parent)):
      pass
  with lock.hold(workdir):
    pass


def test_file_system_without_locks_logs_a_warning(tmp_path, monkeypatch, caplog):
  error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
  monkeypatch.setattr(fcntl, 'flock', mock.Mock(side_effect=error))
  with lock.hold(epath.Path(tmp_path)):
    pass
  (record,) = caplog.records
  assert record.levelname == 'WARNING' and str(tmp_path) in record.message
