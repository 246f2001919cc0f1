"""FARMER (Flow AutoRegressive Transformer over Pixels) for JAX.

`load` opens a trained run:

    run = farmer_jax.load('runs/quickstart')
    images = run.sample([0, 1, 2])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from farmer_jax.api import Run, load

__all__ = ['Run', '__version__', 'load']
__version__ = '0.2.0'


def __getattr__(name: str) -> Any:
  # Imported on first use: `import farmer_jax.config` must not import JAX.
  if name in ('Run', 'load'):
    from farmer_jax import api

    return getattr(api, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
