"""A lock that allows one training run per workdir."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from typing import IO

from absl import logging
from etils import epath

from farmer_jax.errors import WorkdirError

_FILE = 'lock'


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Context that locks WORKDIR/lock with `flock`. `workdir` is an absolute path.

  The kernel releases the lock when the process ends for any reason. Object stores and some network
  file systems have no locks. There, a warning is logged, and a second run is not detected.

  Raises:
    WorkdirError: another process holds the lock.
  """
  if '://' in str(workdir):
    _warn_no_lock(workdir, 'object stores have no locks')
    yield
    return
  with open(os.fspath(workdir / _FILE), 'a+') as file:
    _lock(file, workdir)
    yield


def _lock(file: IO[str], workdir: epath.Path) -> None:
  """Locks an open file, and writes the name of this process into the file."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    owner = file.readline(200).strip() or 'another process'
    raise WorkdirError(
      f'{owner} is training in {workdir}; stop that process, or choose another --workdir'
    ) from None
  except OSError as error:
    _warn_no_lock(workdir, error.strerror or str(error))
    return
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  file.flush()


def _warn_no_lock(workdir: epath.Path, reason: str) -> None:
  logging.warning(
    f'{workdir} cannot be locked ({reason}). Make sure that no other run trains in this workdir,'
    ' because a second run is not detected.'
  )
