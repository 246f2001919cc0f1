"""Exports on the Hugging Face hub: hf://USER/NAME, or hf://USER/NAME@REVISION."""

import functools
import re

from etils import epath

from farmer_jax.errors import WorkdirError, reason

_SCHEME = 'hf://'


def is_url(path: epath.PathLike) -> bool:
  """Returns whether a path is on the hub."""
  return str(path).startswith(_SCHEME)


@functools.cache
def download(url: str) -> str:
  """Downloads the weights and the configuration of an export, once. Returns their folder.

  Raises:
    WorkdirError: the URL is malformed, the client is not installed, or the download fails.
  """
  match = re.fullmatch(r'hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?', url)
  if not match:
    raise WorkdirError(f'{url} is not hf://USER/NAME or hf://USER/NAME@REVISION')
  try:
    import huggingface_hub
  except ImportError as error:
    raise WorkdirError(
      f'{url} needs the package huggingface_hub; run pip install "farmer_jax[hub]"'
    ) from error
  name, revision = match.groups()
  # No code is downloaded.
  patterns = ['*.json', '*.safetensors']
  try:
    return huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
  except Exception as error:  # The client and its HTTP library have many types.
    raise WorkdirError(
      f'cannot download {url} ({reason(error)}); check the name, the network and, for a private'
      ' repository, HF_TOKEN'
    ) from error
