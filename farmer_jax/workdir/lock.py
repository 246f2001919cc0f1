"""The lock of a workdir, so that one run trains there."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from typing import IO

from absl import logging
from etils import epath

from farmer_jax.errors import WorkdirError
from farmer_jax.workdir import store_lock, stores


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Context that locks WORKDIR/lock, so that one run trains in a workdir.

  On file systems, the lock is a `flock`, which the kernel releases when the process ends for any
  reason. Some network file systems have no locks. There, a warning is logged, and a second run is
  not detected. For object stores, see `store_lock`.

  Raises:
    WorkdirError: another process holds the lock.
  """
  with contextlib.ExitStack() as stack:
    if stores.is_store(workdir):
      stack.enter_context(store_lock.hold(workdir))
    else:
      _lock_file(stack.enter_context(open(workdir / 'lock', 'a+')), workdir)
    yield


def _lock_file(file: IO[str], workdir: epath.Path) -> None:
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
    logging.warning(
      f'{workdir} cannot be locked ({error.strerror or error}). Make sure that no other run trains'
      ' in this workdir, because a second run is not detected.'
    )
    return
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  file.flush()
