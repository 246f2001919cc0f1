"""Compiled programs are cached in the workdir, unless the user has set another folder."""

import os

import pytest

from tests.support import processes


@pytest.mark.parametrize('own_folder', [False, True])
def test_second_process_finds_programs_in_the_cache(tmp_path, own_folder, monkeypatch):
  for name in list(os.environ):
    if name.startswith('JAX_COMPILATION_CACHE'):
      monkeypatch.delenv(name)
  default_folder = tmp_path / 'run' / 'compilation_cache'
  folder = tmp_path / 'own' if own_folder else default_folder
  if own_folder:
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(folder))
  hits = [int(processes.run_program('cached_program', tmp_path / 'run')) for _ in range(2)]
  assert hits[0] == 0 and hits[1] > 0
  assert list(folder.iterdir())
  assert default_folder.exists() != own_folder
