"""What a training run carries from step to step."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Health:
  """What the gradients have been like, and how often an update was left out for that."""

  log_norm: jax.Array  # running mean of the logarithm of the gradient's norm
  updates: jax.Array  # int32, updates that went into it
  skipped: jax.Array  # int32, updates left out, in all
  skipped_in_a_row: jax.Array  # int32, of these the last ones without one made in between


@flax.struct.dataclass
class TrainState:
  """Everything that a checkpoint must hold, beside the place in the data."""

  step: jax.Array  # int32 scalar, optimizer steps done
  params: dict
  opt_state: tuple
  average: dict | None  # running average of `params`, if one is kept
  health: Health

  @property
  def best_params(self):
    """The parameters to evaluate and to sample with: the average where there is one."""
    return self.params if self.average is None else self.average


def initializer(init_params, optimizer, ema_decay):
  """A function init(key, constants) -> the state before the first step, of
  init_params(key, **constants)."""

  def init(key, constants):
    return create(init_params(key, **constants), optimizer, ema_decay)

  return init


def create(params, optimizer, ema_decay):
  """The state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    average=jax.tree.map(jnp.copy, params) if ema_decay else None,
    health=Health(jnp.zeros(()), *(jnp.zeros((), jnp.int32) for _ in range(3))),
  )
