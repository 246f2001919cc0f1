"""One training step: gradients, optimizer update and moving average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from farmer_jax import config
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.training import state as state_lib

Batch = dict[str, Any]  # image: uint8 [B, H, W, C], label: int32 [B]
Metrics = dict[str, Float[Array, '']]
LossFn = Callable[..., tuple[Float[Array, ''], Metrics]]
StepFn = Callable[..., tuple[state_lib.TrainState, Metrics]]

# Compiler options for each platform. On CPUs, higher optimization levels of LLVM cost more compile
# time than they save at run time.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
  'cpu': {'xla_backend_optimization_level': '1'}
}


def make_train_step(
  loss_fn: LossFn, optimizer: optax.GradientTransformationExtraArgs, train: config.Train
) -> StepFn:
  """Returns step(state, batch, *frozen) -> (state, metrics).

  A skipped update changes only the step and the counters in the optimizer state.

  loss_fn(params, batch, step, part, *frozen) -> (loss, metrics). The random keys of a call depend
  on `step` and on `part`, the index of the microbatch. Without accumulation, `part` is 0.
  """

  def step_fn(
    state: state_lib.TrainState, batch: Batch, *frozen: state_lib.Params
  ) -> tuple[state_lib.TrainState, Metrics]:
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    parts = train.accumulation_steps
    (loss, metrics), gradients = _accumulate(gradient_fn, state, batch, frozen, parts)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, loss=loss)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
      applied = opt_state.consecutive == 0
      moved = optax.incremental_update(params, ema_params, 1 - train.ema_decay)
      ema_params = jax.tree.map(lambda new, old: jnp.where(applied, new, old), moved, ema_params)
    metrics |= {
      'grad_norm': optax.global_norm(gradients),
      'skipped_updates': opt_state.skipped,
      'consecutive_skips': opt_state.consecutive,
    }
    return state_lib.TrainState(state.step + 1, params, opt_state, ema_params), metrics

  return step_fn


def lower(
  step_fn: StepFn,
  mesh: mesh_lib.Mesh,
  state: state_lib.TrainState,
  batch: Batch,
  frozen: tuple[state_lib.Params, ...] = (),
) -> jax.stages.Lowered:
  """Traces and lowers a training step on a mesh.

  The state is donated. The new state has the sharding of the old state. Arguments are arrays or
  `jax.ShapeDtypeStruct`.
  """
  out_shardings = jax.tree.map(lambda a: a.sharding, state), mesh.replicated
  with mesh.activate():
    jitted = jax.jit(step_fn, donate_argnums=0, out_shardings=out_shardings)
    return jitted.lower(state, batch, *frozen)


def _accumulate(
  gradient_fn: Callable[..., Any],
  state: state_lib.TrainState,
  batch: Batch,
  frozen: tuple[state_lib.Params, ...],
  parts: int,
) -> Any:
  """Returns ((loss, metrics), gradients), averaged over `parts` microbatches of equal size."""
  if parts == 1:
    return gradient_fn(state.params, batch, state.step, 0, *frozen)
  # Microbatch i has the examples i, i + parts, …. No example moves to another device.
  split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)

  def add_part(total: Any, inputs: Any) -> tuple[Any, None]:
    part, index = inputs
    result = gradient_fn(state.params, part, state.step, index, *frozen)
    return jax.tree.map(jnp.add, total, result), None

  first = jax.tree.map(lambda a: a[0], split)
  shapes = jax.eval_shape(gradient_fn, state.params, first, state.step, 0, *frozen)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  total, _ = jax.lax.scan(add_part, zeros, (split, jnp.arange(parts)))
  return jax.tree.map(lambda a: a / parts, total)
