"""Compiles a program with the compilation cache of a workdir. Prints the number of cache hits.

python -m tests.support.programs.cached_program WORKDIR
"""

import sys

import jax
import jax.numpy as jnp
from etils import epath

from farmer_jax.xla import host

if __name__ == '__main__':
  jax.jit(lambda x: x + 1)(1)  # Jobs also compile programs before they know their workdir.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  host.enable_compilation_cache(epath.Path(sys.argv[1]))
  events = []
  jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
  jax.jit(lambda x: (x @ x.T).sum())(jnp.ones((3, 4))).block_until_ready()
  print(events.count('/jax/compilation_cache/cache_hits'))
