"""Units of likelihood."""

import math

# Under uniform dequantisation one grey level is 2/256 wide on the scale [-1, 1]: a density there is
# 128 times a density per grey level.
LOG2_LEVELS_PER_UNIT = 7.0


def bits_per_dim(nats_per_dim):
  """Bits per dimension of the discrete image, from nats/dim of uniformly dequantised data in [-1,
  1].

  Only meaningful for uniform dequantisation: the density of Gaussian-noised data is not a code
  length.
  """
  return nats_per_dim / math.log(2) + LOG2_LEVELS_PER_UNIT
