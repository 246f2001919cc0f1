"""The affine map and the bound of log-scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax.ops import affine

pytestmark = pytest.mark.usefixtures('x64')


def test_bound_of_log_scales():
  """Smooth, monotonic, only for positive values; 0 disables the bound."""
  x = jnp.linspace(-30, 30, 2401)
  bounded = affine.bound_log_scale(x, 2.0)
  np.testing.assert_array_equal(bounded[x <= 0], x[x <= 0])
  assert (np.diff(bounded) >= 0).all() and float(bounded.max()) <= 2.0
  np.testing.assert_allclose(bounded[-1], 2.0)
  np.testing.assert_array_equal(affine.bound_log_scale(x, 0.0), x)
  first = jax.grad(lambda x: affine.bound_log_scale(x, 2.0))
  around_zero = jnp.asarray([-1e-9, 1e-9])
  np.testing.assert_allclose(jax.vmap(first)(around_zero), 1.0, atol=1e-12)
  np.testing.assert_allclose(jax.vmap(jax.grad(first))(around_zero), 0.0, atol=1e-8)
  above, below = (affine.bound_log_scale(x + step, 2.0) for step in (1e-6, -1e-6))
  np.testing.assert_allclose(jax.vmap(first)(x), (above - below) / 2e-6, atol=1e-7)


def test_forward_inverse_and_log_det():
  rng = np.random.default_rng(0)
  z, shift, log_scale = (jnp.asarray(rng.normal(size=(2, 3, 4))) for _ in range(3))
  y, log_det = affine.affine_forward(z, shift, log_scale)
  np.testing.assert_allclose(affine.affine_inverse(y, shift, log_scale), z, atol=1e-14)
  np.testing.assert_allclose(log_det, -np.asarray(log_scale).sum((1, 2)))
