"""Settings of this machine's process, made once at its beginning."""

import ctypes
import os
import sys

import jax

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def cache_compilations(workdir):
  """Keeps compiled programs in WORKDIR/compilation_cache: a job that is started again need not
  compile them again. A user's own JAX_COMPILATION_CACHE_DIR wins."""
  if not jax.config.values['jax_compilation_cache_dir']:
    jax.config.update('jax_compilation_cache_dir', str(workdir / 'compilation_cache'))


def keep_memory():
  """Makes glibc keep freed memory for the next step instead of returning it to the kernel.

  XLA's CPU backend allocates the temporaries of a program at every call. By default each training
  step would map, fault in and unmap hundreds of MB, a quarter of its time. One arena, grown with
  the heap and never trimmed, makes that free after the first few steps. Accelerators manage their
  own memory, and other C libraries lack the call: there, nothing happens. A user's own MALLOC_* or
  GLIBC_TUNABLES win.
  """
  if not sys.platform.startswith('linux'):
    return
  if any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ):
    return
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return
  mallopt(_M_ARENA_MAX, 1)
  mallopt(_M_MMAP_MAX, 0)
  mallopt(_M_TRIM_THRESHOLD, -1)  # never
  mallopt(_M_TOP_PAD, 2**28)
