"""Emulators of object stores, which processes of tests use through their environment."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from tests.support.processes import PROGRAMS, ROOT

_PORTS: dict[str, int] = {}


class Store:
  """An emulator with the bucket `bucket`: 'gs' or 's3'. `environment` leads all clients to it."""

  def __init__(self, scheme, folder):
    # The clients of a process keep their first address.
    if scheme not in _PORTS:
      with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        _PORTS[scheme] = unused.getsockname()[1]
    self.port = _PORTS[scheme]
    self.scheme, self._folder = scheme, folder
    self.url = f'{scheme}://bucket'
    address = f'http://127.0.0.1:{self.port}'
    self.environment = {
      'gs': {'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address},
      's3': {
        'AWS_ENDPOINT_URL': address,
        'AWS_ACCESS_KEY_ID': 'key',
        'AWS_SECRET_ACCESS_KEY': 'secret',
        'AWS_DEFAULT_REGION': 'us-east-1',
      },
    }[scheme]
    self.process = None

  def start(self):
    command = {
      'gs': [sys.executable, '-m', f'{PROGRAMS}.google_store', str(self.port), str(self._folder)],
      's3': [sys.executable, '-m', 'moto.server', '-p', str(self.port)],
    }[self.scheme]
    with open(self._folder / 'store.log', 'ab') as output:
      self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    while True:
      assert self.process.poll() is None, (self._folder / 'store.log').read_text()[-2000:]
      with contextlib.suppress(OSError):
        socket.create_connection(('127.0.0.1', self.port), timeout=1).close()
        break
      time.sleep(0.05)
    if self.scheme == 's3':
      request = urllib.request.Request(f'http://127.0.0.1:{self.port}/bucket', method='PUT')
      with contextlib.suppress(urllib.error.HTTPError):  # The bucket exists after a restart.
        urllib.request.urlopen(request)

  def stop(self):
    self.process.kill()
    self.process.wait()


@contextlib.contextmanager
def running(scheme, folder):
  """Context with a running `Store`, to which the environment leads all clients."""
  store = Store(scheme, folder)
  before = dict(os.environ)
  os.environ.update(store.environment)
  store.start()
  try:
    yield store
  finally:
    store.stop()
    os.environ.clear()
    os.environ.update(before)
