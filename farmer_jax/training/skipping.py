"""An optax wrapper that skips updates whose loss or gradient is unusable."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

# The check of gradient norms starts after this number of updates.
_WARMUP = 100

# Window of the running mean of gradient norms, in updates. While the noise of a curriculum falls,
# norms can grow 30 times within 50 updates. A longer window would not follow them.
_WINDOW = 20


class SkipState(NamedTuple):
  """State of `skip_bad_updates`."""

  inner: optax.OptState
  log_norm: Float[Array, '']  # running mean of the logarithm of the gradient norm
  updates: Int[Array, '']  # number of updates in the running mean
  skipped: Int[Array, '']  # total number of skipped updates
  consecutive: Int[Array, '']  # updates skipped since the last applied update


def skip_bad_updates(
  inner: optax.GradientTransformation, max_norm_ratio: float
) -> optax.GradientTransformationExtraArgs:
  """Skips an update whose loss or gradient is not finite, or whose gradient norm is out of range.

  The norm is out of range if it exceeds `max_norm_ratio` times the running geometric mean of
  earlier norms. The check of the norm starts after 100 updates. The running mean has a window of
  20 updates. A ratio of 0 disables the check. A skipped update is zero and leaves the state of
  `inner` unchanged. `update` of the result also takes the keyword argument `loss`.

  `optax.apply_if_finite` checks neither the loss nor the size of the norm, and after a number of
  failures it applies bad updates. Here, the training loop decides what follows repeated failures.
  """

  def init(params: optax.Params) -> SkipState:
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))
    return SkipState(inner.init(params), jnp.zeros(()), *counters)

  def update(
    gradients: optax.Updates,
    state: SkipState,
    params: optax.Params | None = None,
    *,
    loss: Float[Array, ''],
    **unused: Any,
  ) -> tuple[optax.Updates, SkipState]:
    del unused
    norm = optax.global_norm(gradients)
    good = _is_usable(state, loss, norm, max_norm_ratio)
    updates, inner_state = inner.update(gradients, state.inner, params)
    updates = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), updates)
    inner_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), inner_state, state.inner)
    return updates, _count(state, inner_state, norm, good)

  return optax.GradientTransformationExtraArgs(init, update)


def _is_usable(
  state: SkipState, loss: Float[Array, ''], norm: Float[Array, ''], max_norm_ratio: float
) -> Bool[Array, '']:
  """Returns whether an update should be applied."""
  good = jnp.isfinite(loss) & jnp.isfinite(norm)
  if max_norm_ratio:
    warming_up = state.updates < _WARMUP
    good &= warming_up | (jnp.log(norm) <= state.log_norm + math.log(max_norm_ratio))
  return good


def _count(
  state: SkipState, inner_state: optax.OptState, norm: Float[Array, ''], good: Bool[Array, '']
) -> SkipState:
  """Returns the next state. The running mean ignores gradients of zero, which have no logarithm."""
  counted = good & (norm > 0)
  weight = 1 / jnp.clip(state.updates + 1, 1, _WINDOW)
  moved = state.log_norm + weight * (jnp.log(norm) - state.log_norm)
  return SkipState(
    inner=inner_state,
    log_norm=jnp.where(counted, moved, state.log_norm),
    updates=state.updates + counted,
    skipped=state.skipped + ~good,
    consecutive=jnp.where(good, 0, state.consecutive + 1),
  )
