"""A lock of a workdir in an object store, so that one run trains there.

The lock is the object WORKDIR/lock. Stores create and replace an object only if its generation is
the expected one, so that two processes cannot both take the lock. The owner replaces the object
every 20 seconds. An object that does not change for 60 seconds belongs to a process that was
killed, and the next process takes it over. No clocks are compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import tensorstore
from absl import logging
from etils import epath

from farmer_jax import terminal
from farmer_jax.errors import WorkdirError, reason
from farmer_jax.workdir import stores

_RENEWAL, _EXPIRY = 20.0, 60.0  # seconds
# Seconds to wait for the store at the end of a job. TensorStore tries for many minutes.
_PATIENCE = 10.0


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Context that holds the lock of a workdir. Waits for the lock of a process that was killed.

  If another process takes the lock, which is possible after an outage of 60 seconds, this process
  ends at once, because two runs must not write to one workdir.

  Raises:
    WorkdirError: another process is training in the workdir, or the store cannot be used.
  """
  lock = _Lock(workdir)
  lock.acquire()
  stop = threading.Event()
  renewal = threading.Thread(target=lock.keep, args=(stop,), daemon=True)
  renewal.start()
  try:
    yield
  finally:
    stop.set()
    renewal.join(_PATIENCE)
    lock.release()


class _Lock:
  """The object, and the generation that this process wrote."""

  def __init__(self, workdir: epath.Path):
    self._workdir = workdir
    spec = stores.tensorstore_spec(f'{workdir}/')
    self._store = tensorstore.KvStore.open(spec).result()
    self._generation = b''
    name = f'process {os.getpid()} on {socket.gethostname()}'
    self._owner = {'owner': name, 'id': uuid.uuid4().hex} | _identity()

  def acquire(self) -> None:
    try:
      generation, owner = self._read()
      if owner and not _has_ended(owner):
        generation = self._wait_for_expiry(generation, owner)
      is_taken = not self._write(generation)
    except WorkdirError:
      raise
    except Exception as error:  # TensorStore raises ValueError with its status code.
      raise WorkdirError(f'cannot lock {self._workdir} ({reason(error)})') from error
    if is_taken:
      raise WorkdirError(
        f'another process has just started in {self._workdir}; choose another --workdir'
      )

  def _wait_for_expiry(self, generation: bytes, owner: dict[str, Any]) -> bytes:
    """Returns the generation of the expired lock, or of no lock if the owner has released it."""
    logging.info(
      f'{self._workdir} is locked by {owner.get("owner")}. Waiting {_EXPIRY:.0f} s to see whether'
      ' that process still runs ...'
    )
    deadline = time.monotonic() + _EXPIRY
    while time.monotonic() < deadline:
      time.sleep(min(1.0, _EXPIRY / 10))
      found, now = self._read()
      if not now:
        return found
      if found != generation:
        raise WorkdirError(
          f'{now.get("owner")} is training in {self._workdir}; stop that process, or choose another'
          ' --workdir'
        )
    return generation

  def keep(self, stop: threading.Event) -> None:
    """Renews the lock until `stop` is set."""
    while not stop.wait(_RENEWAL):
      try:
        if self._write(self._generation):
          continue
      except Exception:  # The store is not reachable. The lock is renewed later.
        continue
      if stop.is_set():  # This process has released the lock in the meantime.
        return
      terminal.print_error(
        WorkdirError(f'another process has taken over {self._workdir}; stop one of the processes')
      )
      os._exit(1)

  def release(self) -> None:
    # A lock that cannot be deleted expires.
    with contextlib.suppress(Exception):
      self._store.write('lock', None, if_equal=self._generation).result(_PATIENCE)

  def _read(self) -> tuple[bytes, dict[str, Any] | None]:
    """Returns the generation and the content of the object, which is None if it does not exist."""
    found = self._store.read('lock').result()
    if found.state != 'value':
      return _MISSING, None
    try:
      return found.stamp.generation, dict(json.loads(found.value))
    except (ValueError, TypeError):
      return found.stamp.generation, {'owner': 'an unknown process'}

  def _write(self, expected: bytes) -> bool:
    """Replaces the object if its generation is `expected`. Returns whether it was replaced."""
    content = json.dumps(self._owner | {'time': round(time.time(), 3)}).encode()
    written = self._store.write('lock', content, if_equal=expected).result().generation
    if not written:
      # A retried request may find the object that its first attempt wrote.
      found = self._store.read('lock').result()
      if found.value != content:
        return False
      written = found.stamp.generation
    self._generation = written
    return True


# The generation of an object that does not exist.
_MISSING = tensorstore.KvStore.open('memory://').result().read('').result().stamp.generation


def _identity() -> dict[str, Any]:
  """Returns the process, and the machine and container in which its number is valid."""
  with contextlib.suppress(OSError):
    boot = epath.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return {'pid': os.getpid(), 'machine': f'{boot} {os.readlink("/proc/self/ns/pid")}'}
  return {}


def _has_ended(owner: dict[str, Any]) -> bool:
  """Returns whether the owner was a process of this machine that no longer exists."""
  this = _identity()
  if not this or owner.get('machine') != this['machine'] or not isinstance(owner.get('pid'), int):
    return False
  return not os.path.exists(f'/proc/{owner["pid"]}')
