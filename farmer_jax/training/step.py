"""One optimizer step."""

import functools
import math

import jax
import jax.numpy as jnp
import optax

from farmer_jax.training import state as state_lib

# The gradient's norm is compared with its running mean once so many updates have gone into it, of
# which the last so many count.
_NORM_UPDATES = 100

# By platform. LLVM's later optimisations of XLA's CPU kernels take longer than they ever save.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
  'cpu': {'xla_backend_optimization_level': '1'}
}


def make_train_step(loss_fn, optimizer, train):
  """Builds step(state, batch, constants=None) -> (state, metrics).

  An update is left out, and counted, where the loss or the gradient is not finite, or where the
  gradient's norm is out of the range of those before. Everything but the counters and the step then
  stays as it was.

  Args:
    loss_fn: loss_fn(params, batch, step, part, **constants) -> (scalar loss, dict of scalar
      metrics); `step` and `part` (which part of an accumulated batch this is) name the randomness
      of the call.
    optimizer: an optax transformation.
    train: `config.Train`.
  """

  def step_fn(state, batch, constants=None):
    gradients = jax.value_and_grad(functools.partial(loss_fn, **(constants or {})), has_aux=True)
    (loss, metrics), grads = _accumulated(gradients, state, batch, train.accumulate)
    norm = optax.global_norm(grads)
    good, health = _checked(state.health, loss, norm, train.max_norm_ratio)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
      average = optax.incremental_update(params, average, 1 - train.ema_decay)
    changed = {'params': params, 'opt_state': opt_state, 'average': average}
    before = {name: getattr(state, name) for name in changed}
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), changed, before)
    metrics |= {'grad_norm': norm, 'skipped_updates': health.skipped}
    metrics['skipped_in_a_row'] = health.skipped_in_a_row
    return state.replace(step=state.step + 1, health=health, **kept), metrics

  return step_fn


def _checked(health, loss, norm, max_ratio):
  """Whether an update with this loss and norm of the gradient is to be made; the `Health` after."""
  log_norm = jnp.log(norm)
  good = jnp.isfinite(loss) & jnp.isfinite(norm)
  if max_ratio:
    known = health.updates >= _NORM_UPDATES
    good &= ~known | (log_norm <= health.log_norm + math.log(max_ratio))
  share = 1 / jnp.clip(health.updates + 1, 1, _NORM_UPDATES)
  # A gradient of zero has no logarithm, and says nothing of the others.
  counts = good & (norm > 0)
  moved = health.log_norm + share * (log_norm - health.log_norm)
  return good, state_lib.Health(
    log_norm=jnp.where(counts, moved, health.log_norm),
    updates=health.updates + counts,
    skipped=health.skipped + ~good,
    skipped_in_a_row=jnp.where(good, 0, health.skipped_in_a_row + 1),
  )


def lower(step_fn, mesh, state, batch, constants):
  """Traces a step for a `mesh.Mesh`, ready to be compiled; the state is donated and stays where it
  is. Arguments are arrays, or what describes arrays that are not there."""
  stays = jax.tree.map(lambda a: a.sharding, state), mesh.whole
  with mesh():
    jitted = jax.jit(step_fn, donate_argnums=0, out_shardings=stays)
    return jitted.lower(state, batch, constants)


def _accumulated(gradients, state, batch, parts):
  """Loss, metrics and gradients of the whole batch, as the mean over `parts` equal parts of it."""
  if parts == 1:
    return gradients(state.params, batch, state.step, 0)
  # Every parts-th example goes together: each device's share of the batch is divided, not moved.
  split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)

  def add_part(total, inputs):
    part, index = inputs
    return jax.tree.map(jnp.add, total, gradients(state.params, part, state.step, index)), None

  first = jax.tree.map(lambda a: a[0], split)
  shapes = jax.eval_shape(gradients, state.params, first, state.step, 0)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  total, _ = jax.lax.scan(add_part, zeros, (split, jnp.arange(parts)))
  return jax.tree.map(lambda a: a / parts, total)
