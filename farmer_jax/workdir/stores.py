"""Object stores: paths such as gs://bucket/run and s3://bucket/run.

etils and JAX's compilation cache reach a store through fsspec (gcsfs, s3fs), and Orbax through
TensorStore, whether or not TensorFlow is installed. All of them use the same credentials, and the
same emulators: STORAGE_EMULATOR_HOST with TENSORSTORE_GCS_HTTP_URL, and AWS_ENDPOINT_URL.
"""

import functools
import logging
import os
import urllib.parse
from typing import Any

import fsspec
from etils import epath

from farmer_jax.errors import WorkdirError, reason

# Without this variable, etils uses TensorFlow's client if TensorFlow is installed.
os.environ.setdefault('EPATH_USE_TF', 'false')

# Module, extra of farmer_jax and method that sends all requests, for each scheme. The methods are
# private ones of gcsfs 2026.10 and s3fs 2026.9.
_CLIENTS = {'gs': ('gcsfs', 'gcs', '_request'), 's3': ('s3fs', 's3', '_call_s3')}
# Seconds after which a bucket counts as unreachable. The clients themselves try for minutes.
_TIMEOUT = 20.0


class StoreError(WorkdirError, OSError):
  """A request to an object store failed. Handled like a failure of a disk."""


def is_store(path: epath.PathLike) -> bool:
  """Returns whether a path is in an object store."""
  return '://' in str(path)


def check(path: epath.PathLike) -> None:
  """Checks that the bucket of a path can be reached. Does nothing for other paths.

  Raises:
    WorkdirError: the path has no bucket, the client is not installed, the bucket does not exist or
      cannot be listed, or it does not answer within 20 seconds.
  """
  url = urllib.parse.urlparse(str(path))
  if is_store(path) and (url.netloc or url.scheme not in _CLIENTS):
    _check_bucket(url.scheme, url.netloc)
  elif url.scheme in _CLIENTS:  # gs://, or gs:/bucket, which is otherwise a local folder.
    raise WorkdirError(f'{path} names no bucket; use {url.scheme}://BUCKET/FOLDER')


@functools.cache
def _check_bucket(scheme: str, bucket: str) -> None:
  client = _connect(scheme)
  if scheme == 'gs':
    request = functools.partial(client._call, 'GET', 'b/{}/o', bucket, maxResults=1)
  else:
    request = functools.partial(client._call_s3, 'list_objects_v2', Bucket=bucket, MaxKeys=1)
  try:
    fsspec.asyn.sync(client.loop, request, timeout=_TIMEOUT)
  except FileNotFoundError:
    raise WorkdirError(f'the bucket {scheme}://{bucket} does not exist; create it first') from None
  except fsspec.FSTimeoutError as error:
    raise WorkdirError(
      f'{scheme}://{bucket} does not answer within {_TIMEOUT:.0f} s; check the network'
    ) from error
  except OSError as error:
    raise WorkdirError(
      f'cannot use {scheme}://{bucket} ({describe(error)}); check the credentials, the permissions'
      ' and the network'
    ) from error


def tensorstore_spec(path: str) -> dict[str, Any]:
  """Returns the specification with which TensorStore opens a path in an object store."""
  url = urllib.parse.urlparse(path)
  spec: dict[str, Any] = {'bucket': url.netloc, 'path': url.path.lstrip('/')}
  if url.scheme == 'gs':
    return spec | {'driver': 'gcs'}
  # TensorStore, unlike other clients, does not read these variables.
  if endpoint := os.environ.get('AWS_ENDPOINT_URL'):
    region = os.environ.get('AWS_REGION', os.environ.get('AWS_DEFAULT_REGION', 'us-east-1'))
    spec |= {'endpoint': endpoint, 'aws_region': region}
  if 'AWS_ACCESS_KEY_ID' in os.environ:  # Otherwise TensorStore logs that it finds no AWS files.
    spec |= {'aws_credentials': {'type': 'environment'}}
  return spec | {'driver': 's3'}


def copy_files(source: epath.PathLike, target: epath.Path) -> None:
  """Copies the files of a folder and of its subfolders to an object store."""
  for folder, _, names in os.walk(source):
    for name in names:
      file = os.path.join(folder, name)
      (target / os.path.relpath(file, source)).write_bytes(epath.Path(file).read_bytes())


def describe(error: OSError) -> str:
  """Returns the reason of an `OSError` in one line of at most 200 characters."""
  return ' '.join(str(error.strerror or error).split())[:200] or type(error).__name__


@functools.cache
def _connect(scheme: str) -> Any:
  """Returns the fsspec client of a scheme, and registers it for etils."""
  if scheme not in _CLIENTS:
    raise WorkdirError(
      f'{scheme}:// is not supported; use a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER'
    )
  module, extra, method = _CLIENTS[scheme]
  # The clients log the traceback of the last attempt of every request.
  for name in (module, 'fsspec'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  protocol = {'gs': 'gcs'}.get(scheme, scheme)
  try:
    base = fsspec.get_filesystem_class(protocol)
  except ImportError as error:
    raise WorkdirError(
      f'{scheme}:// needs the package {module}; run pip install "farmer_jax[{extra}]"'
    ) from error

  async def request(self: Any, *args: Any, **kwargs: Any) -> Any:
    try:
      return await getattr(base, method)(self, *args, **kwargs)
    except (FileNotFoundError, FileExistsError, StoreError):
      raise
    except Exception as error:  # Each client has its own types.
      raise StoreError(f'the object store failed: {reason(error)}') from error

  def init(self: Any, *args: Any, **kwargs: Any) -> None:
    # Another process may have changed a folder that this process has listed.
    base.__init__(self, *args, use_listings_cache=False, **kwargs)

  # The methods of fsspec return False after any error, so that an outage would look like a workdir
  # without checkpoints.
  async def isdir(self: Any, path: str) -> bool:
    return await _type(self, path) == 'directory'

  async def isfile(self: Any, path: str) -> bool:
    return await _type(self, path) == 'file'

  methods = {method: request, '__init__': init, '_isdir': isdir, '_isfile': isfile}
  client = type(base.__name__, (base,), methods)
  for name in (protocol, scheme):
    fsspec.register_implementation(name, client, clobber=True)
  return fsspec.filesystem(protocol)


async def _type(client: Any, path: str) -> str | None:
  """Returns 'file', 'directory', or None if the path does not exist."""
  try:
    return (await client._info(path))['type']
  except FileNotFoundError:
    return None
