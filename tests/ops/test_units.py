"""Units of likelihood."""

import math

import pytest

from farmer_jax.ops import units


@pytest.mark.parametrize(
  'nats_per_dim, expected',
  [
    (math.log(2), 8),  # uniform on [-1, 1]: density 1/2, 256 equally likely levels
    (0.0, 7),  # uniform on half of that range: 128 levels
    (math.log(2 / 256), 0),  # uniform on one level
  ],
)
def test_uniform_densities(nats_per_dim, expected):
  assert units.bits_per_dim(nats_per_dim) == pytest.approx(expected, abs=1e-12)
