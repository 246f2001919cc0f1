"""One run per workdir. A lock of a killed process: tests/faults/test_preemption.py."""

import errno
import fcntl
import os
from unittest import mock

import pytest
from etils import epath

from farmer_jax import errors
from farmer_jax.workdir import layout


def test_second_run_is_refused_until_the_first_ends(tmp_path):
  workdir = epath.Path(tmp_path)
  with layout.lock(workdir):
    with pytest.raises(errors.WorkdirError, match=f'process {os.getpid()} on .*{tmp_path}'):
      layout.lock(workdir).__enter__()
    with layout.lock(epath.Path(tmp_path.parent)):
      pass
  with layout.lock(workdir):
    pass


def test_file_system_without_locks_logs_a_warning(tmp_path, monkeypatch, caplog):
  error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
  monkeypatch.setattr(fcntl, 'flock', mock.Mock(side_effect=error))
  with layout.lock(epath.Path(tmp_path)):
    pass
  (record,) = caplog.records
  assert record.levelname == 'WARNING' and str(tmp_path) in record.message
