"""Object stores that cannot be used: one line that names the store, without a long wait."""

import http.server
import os
import subprocess
import sys
import threading
import time

import pytest

from tests.support import processes, stores

pytest.importorskip('gcp_storage_emulator', reason='make stores installs the emulators')
pytestmark = pytest.mark.stores
SCHEMES = pytest.mark.parametrize('scheme', ['gs', 's3'])


def run(workdir, environment, *arguments):
  """Starts a training run. Returns its last line, and asserts that it fails without a traceback."""
  command = [sys.executable, '-m', 'farmer_jax.main', '--config=configs/quickstart.py', *arguments]
  environment = {**processes.environment(1), **environment}
  for name in [name for name, value in environment.items() if value is None]:
    environment.pop(name)
  start = time.monotonic()
  done = subprocess.run(
    [*command, f'--workdir={workdir}'],
    **dict(cwd=processes.ROOT, env=environment, capture_output=True, text=True, timeout=200),
  )
  assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr[-2000:]
  assert time.monotonic() - start < 90
  (line,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  return line


@SCHEMES
def test_bucket_that_does_not_exist(scheme, tmp_path):
  with stores.running(scheme, tmp_path):
    assert f'{scheme}://other does not exist' in run(f'{scheme}://other/run', {})


@SCHEMES
def test_store_that_refuses_connections(scheme, tmp_path):
  store = stores.Store(scheme, tmp_path)
  assert f'{scheme}://bucket' in run(f'{scheme}://bucket/run', store.environment)


class Forbidden(http.server.BaseHTTPRequestHandler):
  """Answers every request with 403."""

  def do_GET(self):
    self.send_response(403)
    self.end_headers()
    self.wfile.write(b'{"error": {"code": 403, "message": "no access"}}')

  do_PUT = do_POST = do_HEAD = do_GET

  def log_message(self, *unused):
    pass


@SCHEMES
def test_store_without_permission(scheme, tmp_path):
  store = stores.Store(scheme, tmp_path)
  with http.server.ThreadingHTTPServer(('127.0.0.1', store.port), Forbidden) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    line = run(f'{scheme}://bucket/run', store.environment)
    server.shutdown()
  assert f'{scheme}://bucket' in line and 'permissions' in line


class Silent(http.server.BaseHTTPRequestHandler):
  """Does not answer."""

  def do_GET(self):
    time.sleep(300)


@SCHEMES
def test_store_that_does_not_answer(scheme, tmp_path):
  store = stores.Store(scheme, tmp_path)
  server = http.server.ThreadingHTTPServer(('127.0.0.1', store.port), Silent)
  server.daemon_threads = True
  threading.Thread(target=server.serve_forever, daemon=True).start()
  assert 'does not answer' in run(f'{scheme}://bucket/run', store.environment)
  server.shutdown()
  server.server_close()  # The next store has the same port.


def test_no_credentials(tmp_path):
  names = 'AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'
  unset = {**dict.fromkeys(names), 'AWS_EC2_METADATA_DISABLED': 'true', 'HOME': str(tmp_path)}
  assert 'credentials' in run('s3://bucket/run', unset)


@pytest.mark.parametrize('module, extra', [('gcsfs', 'gcs'), ('s3fs', 's3')])
def test_missing_client_names_the_extra(module, extra, tmp_path):
  (tmp_path / f'{module}.py').write_text(f'raise ImportError("No module named {module}")')
  path = os.pathsep.join([str(tmp_path), str(processes.ROOT)])
  line = run(f'{"gs" if extra == "gcs" else "s3"}://bucket/run', {'PYTHONPATH': path})
  assert f'pip install "farmer_jax[{extra}]"' in line


def test_path_without_a_bucket():
  for path in 'gs://', 'gs:/bucket/run', 's3:/bucket/run':
    assert '://BUCKET/FOLDER' in run(path, {})


def test_unknown_scheme():
  assert 'gs://BUCKET/FOLDER' in run('hdfs://bucket/run', {})


@SCHEMES
def test_jobs_on_a_run_that_does_not_exist(scheme, tmp_path):
  with stores.running(scheme, tmp_path):
    assert 'config.json' in run(f'{scheme}://bucket/none', {}, '--job=sample')
