"""Units of likelihood and of errors."""

import math
from typing import TypeVar

import numpy as np
from jaxtyping import Array

# Under uniform dequantization, a gray level has a width of 2/256 in [-1, 1]. A density per unit
# length is therefore 128 = 2^7 times the density per gray level.
LOG2_LEVELS_PER_UNIT = 7.0

Nats = TypeVar('Nats', float, Array, np.ndarray)


def bits_per_dim(nats_per_dim: Nats) -> Nats:
  """Converts nats/dim of uniformly dequantized images in [-1, 1] to bits/dim of discrete images.

  The result bounds a code length only under uniform dequantization, not under Gaussian noise.
  """
  return nats_per_dim / math.log(2) + LOG2_LEVELS_PER_UNIT


def psnr(rmse: float) -> float:
  """Converts a root mean square error of values in [-1, 1] to the PSNR in dB."""
  return 20 * math.log10(2 / rmse) if rmse else math.inf
