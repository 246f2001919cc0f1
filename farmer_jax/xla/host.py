"""Process-wide settings: options of JAX, the compilation cache and the memory allocator."""

import contextlib
import ctypes
import os

import jax
from etils import epath

from farmer_jax.errors import ConfigError, reason

# Options that change random numbers or results, or that make JAX refuse operations of this program.
# The environment can set them, for example by JAX_ENABLE_X64.
_JAX_OPTIONS = {
  'jax_default_prng_impl': 'threefry2x32',
  'jax_threefry_partitionable': True,
  'jax_random_seed_offset': 0,
  'jax_numpy_dtype_promotion': 'standard',
  'jax_numpy_rank_promotion': 'allow',
}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def configure_jax(enable_x64: bool) -> None:
  """Sets the options that affect results, whatever the environment says, and opens the devices.

  Raises:
    ConfigError: the platform that JAX_PLATFORMS names has no devices.
  """
  for name, value in {**_JAX_OPTIONS, 'jax_enable_x64': enable_x64}.items():
    jax.config.update(name, value)
  try:
    jax.devices()
  except Exception as error:  # The type depends on the platform.
    platforms = jax.config.values['jax_platforms']
    raise ConfigError(
      f'JAX cannot use JAX_PLATFORMS={platforms} ({reason(error)}); install JAX for'
      ' this platform, for example with pip install "jax[cuda12]", or set JAX_PLATFORMS=cpu'
    ) from error


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
