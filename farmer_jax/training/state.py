"""The training state, which a checkpoint stores in addition to the iterator state."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

Params = dict[str, Any]


@flax.struct.dataclass
class TrainState:
  """Training state after `step` steps."""

  step: Int[Array, '']  # completed training steps, int32
  params: Params
  opt_state: optax.OptState
  ema_params: Params | None  # exponential moving average of `params`

  @property
  def evaluation_params(self) -> Params:
    """Parameters for evaluation and sampling: `ema_params`, or `params` if it is None."""
    return self.params if self.ema_params is None else self.ema_params


def initializer(
  init_params: Callable[..., Params], optimizer: optax.GradientTransformation, ema_decay: float
) -> Callable[..., TrainState]:
  """Returns a function init(key, *frozen) that creates the `TrainState` before the first step.

  init_params(key, *frozen) returns parameters, boxed with their logical axis names. An `ema_decay`
  of 0 disables the moving average.
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
