"""One training run in a workdir at a time."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid

from farmer_jax import terminal
from farmer_jax.errors import ConfigError
from farmer_jax.workdir import layout

_FILE = 'lock.json'

# Where the file system has no locks, the owner says so often that it lives, seconds; one that has
# said nothing for so long is dead.
_BEAT, _LAPSE = 30.0, 120.0

# Of those that come at the same moment the one stays that wrote last, so many seconds later.
_SETTLE = 2.0


@contextlib.contextmanager
def held(workdir):
  """Context in which no other process may hold the same workdir.

  On a file system the kernel keeps the lock, and drops it with its owner, however that ends. On
  object storage, which has none, WORKDIR/lock.json is renewed every half minute; whoever finds one
  there waits for it to lapse.

  Args:
    workdir: an absolute `epath.Path`.

  Raises:
    ConfigError: another process holds it.
  """
  file = workdir / _FILE
  with (_beating if '://' in str(workdir) else _locked)(file):
    yield


@contextlib.contextmanager
def _locked(file):
  import fcntl  # Not on Windows, which this project has not been tried on.

  with open(os.fspath(file), 'a+') as stream:
    try:
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      stream.seek(0)
      raise _taken(file, _owner_of(stream.read())) from None
    except OSError as error:  # a file system without locks
      terminal.say(
        f'{file.parent} cannot be locked ({error.strerror}); only timestamps protect it.'
      )
      with _beating(file):
        yield
      return
    stream.truncate(0)
    stream.write(json.dumps(_owner()) + '\n')
    stream.flush()
    yield


@contextlib.contextmanager
def _beating(file):
  mine = _owner()
  _wait_for_lapse(file)
  layout.write_atomically(file, json.dumps(mine) + '\n')
  time.sleep(_SETTLE)
  written = _owner_of(file.read_text())
  if written.get('id') != mine['id']:
    raise _taken(file, written)
  ended = threading.Event()

  def beat():
    while not ended.wait(_BEAT):
      with contextlib.suppress(OSError):
        layout.write_atomically(file, json.dumps(mine | {'time': time.time()}) + '\n')

  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    file.unlink(missing_ok=True)


def _wait_for_lapse(file):
  """Returns once no living process is heard of; raises when one is."""
  first = _owner_of(file.read_text()) if file.exists() else {}
  deadline = time.monotonic() + _LAPSE
  if first:
    terminal.say(f'Waiting for up to {_LAPSE:.0f} s whether {_described(first)} still works here.')
  while first and time.monotonic() < deadline:
    time.sleep(min(5.0, _BEAT / 2))
    now = _owner_of(file.read_text()) if file.exists() else {}
    if now.get('time') != first.get('time'):
      if now:
        raise _taken(file, now)
      return


def _owner():
  return {
    'id': uuid.uuid4().hex,
    'host': socket.gethostname(),
    'process': os.getpid(),
    'time': time.time(),
  }


def _owner_of(text):
  try:
    return dict(json.loads(text))
  except (ValueError, TypeError):
    return {}


def _described(owner):
  return f'process {owner.get("process", "?")} on {owner.get("host", "an unknown host")}'


def _taken(file, owner):
  return ConfigError(
    f'{_described(owner)} is training in {file.parent}; wait for it, end it, or choose another'
    ' --workdir'
  )
