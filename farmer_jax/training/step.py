"""The training state and one training step: gradients, optimizer update and moving average."""

import os
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from farmer_jax import config
from farmer_jax.distributed import mesh as mesh_lib

Params = dict[str, Any]
Batch = dict[str, Any]  # image: uint8 [B, H, W, C], label: int32 [B]
Metrics = dict[str, Float[Array, '']]
LossFn = Callable[..., tuple[Float[Array, ''], Metrics]]

# Compiler options for each platform. On CPUs, higher optimization levels of LLVM cost more compile
# time than they save at run time. On GPUs, the scheduler lets collectives run during arithmetic.
_COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
  'cpu': {'xla_backend_optimization_level': '1'},
  'gpu': {'xla_gpu_enable_latency_hiding_scheduler': True},
}


def compiler_options(platform: str) -> dict[str, str | bool]:
  """Returns the compiler options of a training step. XLA_FLAGS takes precedence."""
  given = os.environ.get('XLA_FLAGS', '')
  options = _COMPILER_OPTIONS.get(platform, {})
  return {name: value for name, value in options.items() if f'--{name}' not in given}


@flax.struct.dataclass
class TrainState:
  """Training state after `step` steps. A checkpoint also stores the iterator state."""

  step: Int[Array, '']  # completed training steps, int32
  params: Params
  opt_state: optax.OptState
  ema_params: Params | None  # exponential moving average of `params`

  @property
  def evaluation_params(self) -> Params:
    """Parameters for evaluation and sampling: `ema_params`, or `params` if it is None."""
    return self.params if self.ema_params is None else self.ema_params


StepFn = Callable[..., tuple[TrainState, Metrics]]


def initializer(
  init_params: Callable[..., Params], optimizer: optax.GradientTransformation, ema_decay: float
) -> Callable[..., TrainState]:
  """Returns a function init(key, *frozen) that creates the `TrainState` before the first step.

  init_params(key, *frozen) returns parameters, boxed with their logical axis names.
  """

  def init(key: PRNGKeyArray, *frozen: Params) -> TrainState:
    params = init_params(key, *frozen)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      ema_params=jax.tree.map(jnp.copy, params) if ema_decay else None,
    )

  return init


def make_train_step(
  loss_fn: LossFn, optimizer: optax.GradientTransformationExtraArgs, train: config.Train
) -> StepFn:
  """Returns step(state, batch, *frozen) -> (state, metrics).

  A skipped update changes only the step and the counters in the optimizer state.

  loss_fn(params, batch, step, part, *frozen) -> (loss, metrics). The random keys of a call depend
  on `step` and on `part`, the index of the microbatch. Without accumulation, `part` is 0.
  """

  def step_fn(state: TrainState, batch: Batch, *frozen: Params) -> tuple[TrainState, Metrics]:
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    parts = train.accumulation_steps
    (loss, metrics), gradients = _accumulate(gradient_fn, state, batch, frozen, parts)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, loss=loss)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
      applied = opt_state.consecutive == 0
      moved = optax.incremental_update(params, ema_params, 1 - train.ema_decay)
      ema_params = optax.tree.where(applied, moved, ema_params)
    metrics |= {
      'grad_norm': optax.global_norm(gradients),
      'skipped_updates': opt_state.skipped,
      'consecutive_skips': opt_state.consecutive,
    }
    return TrainState(state.step + 1, params, opt_state, ema_params), metrics

  return step_fn


def lower(
  step_fn: StepFn,
  mesh: mesh_lib.Mesh,
  state: TrainState,
  batch: Batch,
  frozen: tuple[Params, ...] = (),
) -> jax.stages.Lowered:
  """Traces and lowers a training step on a mesh.

  The state is donated and keeps its sharding. Arguments are arrays or `jax.ShapeDtypeStruct`.
  """
  out_shardings = jax.tree.map(lambda a: a.sharding, state), mesh.replicated
  with mesh.activate():
    jitted = jax.jit(step_fn, donate_argnums=0, out_shardings=out_shardings)
    return jitted.lower(state, batch, *frozen)


def _accumulate(
  gradient_fn: Callable[..., Any],
  state: TrainState,
  batch: Batch,
  frozen: tuple[Params, ...],
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
  zeros = jax.tree.map(jnp.zeros_like, shapes)
  total, _ = jax.lax.scan(add_part, zeros, (split, jnp.arange(parts)))
  return jax.tree.map(lambda a: a / parts, total)
