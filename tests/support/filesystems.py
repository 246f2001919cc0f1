"""File systems that are full or read-only."""

import contextlib
import os
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, size):
  """Mounts a tmpfs of `size`, such as 2m, at `folder`. Skips the test if it cannot mount."""
  folder.mkdir(exist_ok=True)
  mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting needs root')
  try:
    yield
  finally:
    subprocess.run(['umount', str(folder)], check=True)


@contextlib.contextmanager
def unprivileged():
  """Context in which root has only the permissions of an unprivileged user."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


def fill(file):
  """Writes to `file` until the disk is full."""
  with file.open('wb', buffering=0) as stream, contextlib.suppress(OSError):
    while True:
      stream.write(bytes(512))
