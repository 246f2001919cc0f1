"""The optimizer: Muon or AdamW, warm-up, cosine decay, gradient clipping. Skips bad updates."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax import contrib

from farmer_jax import config as config_lib
from farmer_jax.nn import scaling

# The check of gradient norms starts after this number of updates.
_WARMUP = 100

# Window of the running mean of gradient norms, in updates. While the noise of a curriculum falls,
# norms can grow 30 times within 50 updates. A longer window would not follow them.
_WINDOW = 20


def learning_rate_schedule(train: config_lib.Train) -> optax.Schedule:
  """Returns a schedule over the update count: linear warm-up, then cosine decay.

  If the run was extended, the schedules of `config.Train.schedules` follow each other.
  """
  first, *others = train.schedules
  rate = _curve(train.optimizer, first)
  for later in others:
    rate = functools.partial(_switch, later.start, rate, _curve(train.optimizer, later))
  return rate


def _switch(step: int, before: optax.Schedule, after: optax.Schedule, count: Any) -> Any:
  """Returns the value of the schedule `before` below the count `step`, and `after` from it on."""
  return jnp.where(count < step, before(count), after(count))


def _curve(o: config_lib.Optimizer, schedule: config_lib.Schedule) -> optax.Schedule:
  """Returns the learning rate of one of `config.Train.schedules`."""
  last = max(schedule.steps - 1, 1)  # The first update has the count 0.
  if schedule.kind == 'restart_cosine':
    ratio, length = o.final_learning_rate / o.learning_rate, max(last - schedule.start, 1)
    cosine = optax.cosine_decay_schedule(o.learning_rate, length, ratio)
    return lambda count: cosine(jnp.maximum(count - schedule.start, 0))
  warmup = min(o.warmup_steps, last - 1)
  return optax.warmup_cosine_decay_schedule(
    init_value=o.learning_rate / max(warmup, 1),
    peak_value=o.learning_rate,
    warmup_steps=warmup,
    decay_steps=last,
    end_value=o.final_learning_rate,
  )


def create(config: config_lib.Config) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer. Its `update` takes the loss as a keyword argument.

  Muon, if configured, orthogonalizes the updates of matrices inside transformer layers (arXiv
  2502.16982). Adam computes all other updates. `nn.scaling` defines the size of updates. Weight
  decay acts only on the kernels of linear layers, and it does not depend on the width.
  """
  o = config.train.optimizer

  def decay_mask(params: optax.Params) -> optax.Params:
    # Boxes lengthen the paths of parameters, so 'kernel' may not be the last key.
    return jax.tree_util.tree_map_with_path(
      lambda path, _: jax.tree_util.DictKey('kernel') in path, params
    )

  def scale_by_factors(updates: optax.Updates, _: Any) -> optax.Updates:
    factors = scaling.learning_rate_factors(updates, config)
    return jax.tree.map(lambda update, factor: update * factor, updates, factors)

  direction = optax.scale_by_adam(o.b1, o.b2)
  if o.kind == 'muon':
    direction = optax.partition(
      {'adam': direction, 'muon': _muon(o.muon_momentum)},
      functools.partial(scaling.optimizer_of_parameters, config=config),
    )
  optimizer = optax.chain(
    optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
    direction,
    optax.stateless(scale_by_factors),
    optax.add_decayed_weights(o.weight_decay, decay_mask),
    optax.scale_by_learning_rate(learning_rate_schedule(config.train)),
  )
  return skip_bad_updates(optimizer, config.train.max_grad_norm_ratio)


def _muon(momentum: float) -> optax.GradientTransformation:
  """Orthogonalizes the momentum of matrices. Their axes are the last two of each parameter."""

  def matrix_axes(updates: optax.Updates) -> Any:
    return jax.tree.map(lambda a: contrib.MuonDimensionNumbers(a.ndim - 2, a.ndim - 1), updates)

  return contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=matrix_axes)


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
  earlier norms. The check of the norm starts after 100 updates. A ratio of 0 disables it. A skipped
  update is zero and leaves the state of `inner` unchanged. `update` also takes a keyword `loss`.

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
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if max_norm_ratio:
      in_range = jnp.log(norm) <= state.log_norm + math.log(max_norm_ratio)
      good &= (state.updates < _WARMUP) | in_range
    updates, inner_state = inner.update(gradients, state.inner, params)
    updates = optax.tree.where(good, updates, optax.tree.zeros_like(updates))
    inner_state = optax.tree.where(good, inner_state, state.inner)
    counted = good & (norm > 0)  # A gradient of zero has no logarithm.
    weight = 1 / jnp.clip(state.updates + 1, 1, _WINDOW)
    moved = state.log_norm + weight * (jnp.log(norm) - state.log_norm)
    new_state = SkipState(
      inner=inner_state,
      log_norm=jnp.where(counted, moved, state.log_norm),
      updates=state.updates + counted,
      skipped=state.skipped + ~good,
      consecutive=jnp.where(good, 0, state.consecutive + 1),
    )
    return updates, new_state

  return optax.GradientTransformationExtraArgs(init, update)
