"""The bound of log-scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax.ops import affine

pytestmark = pytest.mark.usefixtures('x64')


def test_bound_is_smooth_one_sided_and_off_at_zero():
  x = jnp.linspace(-30, 30, 2401)
  bounded = affine.bounded(x, 2.0)
  np.testing.assert_array_equal(bounded[x <= 0], x[x <= 0])
  assert (np.diff(bounded) >= 0).all() and float(bounded.max()) <= 2.0
  np.testing.assert_allclose(bounded[-1], 2.0)
  np.testing.assert_array_equal(affine.bounded(x, 0.0), x)
  first = jax.vmap(jax.grad(lambda x: affine.bounded(x, 2.0)))
  second = jax.vmap(jax.grad(lambda x: jax.grad(lambda x: affine.bounded(x, 2.0))(x)))
  around_zero = jnp.asarray([-1e-9, 1e-9])
  np.testing.assert_allclose(first(around_zero), 1.0, atol=1e-12)
  np.testing.assert_allclose(second(around_zero), 0.0, atol=1e-8)
  numeric = (affine.bounded(x + 1e-6, 2.0) - affine.bounded(x - 1e-6, 2.0)) / 2e-6
  np.testing.assert_allclose(first(x), numeric, atol=1e-7)


def test_forward_and_inverse_agree_and_log_det_counts_the_scales():
  rng = np.random.default_rng(0)
  z, shift, log_scale = (jnp.asarray(rng.normal(size=(2, 3, 4))) for _ in range(3))
  y, log_det = affine.affine_forward(z, shift, log_scale)
  np.testing.assert_allclose(affine.affine_inverse(y, shift, log_scale), z, atol=1e-14)
  np.testing.assert_allclose(log_det, -np.asarray(log_scale).sum((1, 2)))
