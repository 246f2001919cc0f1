"""Compiled programs are kept with the run, unless the user keeps them elsewhere."""

import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import pathlib, sys
import jax
from farmer_jax.xla import host
jax.jit(lambda x: x + 1)(1)  # something compiled before the workdir is known
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
host.cache_compilations(pathlib.Path(sys.argv[1]))
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((3, 4))).block_until_ready()
print(sum(name == '/jax/compilation_cache/cache_hits' for name in hits))
"""


@pytest.mark.parametrize('own', [False, True], ids=['by default', 'the user has one'])
def test_the_second_process_finds_what_the_first_compiled(tmp_path, own):
  environment = {k: v for k, v in os.environ.items() if not k.startswith('JAX_COMPILATION_CACHE')}
  folder = tmp_path / 'run' / 'compilation_cache'
  if own:
    folder = tmp_path / 'own'
    environment['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  found = []
  for _ in range(2):
    done = subprocess.run(
      [sys.executable, '-c', PROGRAM, str(tmp_path / 'run')],
      cwd=pathlib.Path(__file__).parents[2],
      env=environment,
      capture_output=True,
      text=True,
      check=True,
    )
    found.append(int(done.stdout))
  assert found[0] == 0 and found[1] > 0
  assert list(folder.iterdir())
  assert own != (tmp_path / 'run' / 'compilation_cache').exists()
