"""Handwritten digits, 8×8, class-conditional: minutes on a laptop.

python -m farmer_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from farmer_jax import config


def get_config():
  """The 1,797 digits of scikit-learn under uniform dequantisation."""
  c = config.defaults()
  c.name = 'quickstart'
  c.data.source = 'digits'
  return c
