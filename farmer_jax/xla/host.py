"""Process-wide settings of the host: the compilation cache and the memory allocator."""

import contextlib
import ctypes
import os

import jax
from etils import epath

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def enable_compilation_cache(workdir: epath.Path) -> None:
  """Caches compiled programs in WORKDIR/compilation_cache, so that a resumed job does not compile.

  The environment variable JAX_COMPILATION_CACHE_DIR takes precedence.
  """
  if not jax.config.values['jax_compilation_cache_dir']:
    jax.config.update('jax_compilation_cache_dir', str(workdir / 'compilation_cache'))


def configure_malloc() -> None:
  """Makes glibc keep freed memory for the next step instead of returning it to the kernel.

  XLA's CPU backend allocates the temporary buffers of a program at every call. With glibc's
  defaults, each training step maps, faults in and unmaps hundreds of MB, which takes a quarter of
  its time. With one arena that is never trimmed, this cost disappears after a few steps. Must be
  called before the first computation. Does nothing with other C libraries. The environment
  variables MALLOC_* and GLIBC_TUNABLES take precedence.
  """
  if any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ):
    return
  with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # -1: never trim
    mallopt(_M_TOP_PAD, 2**28)
