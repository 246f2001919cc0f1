"""The optimizer: Muon or AdamW, warm-up, cosine decay, gradient clipping. Skips bad updates."""

import functools
from typing import Any

import jax
import optax
from optax import contrib

from farmer_jax import config as config_lib
from farmer_jax.nn import scaling
from farmer_jax.training import skipping


def learning_rate_schedule(train: config_lib.Train) -> optax.Schedule:
  """Returns a schedule over the update count: linear warm-up, then cosine decay."""
  o = train.optimizer
  warmup = min(o.warmup_steps, train.steps - 1)
  return optax.warmup_cosine_decay_schedule(
    init_value=o.learning_rate / max(warmup, 1),
    peak_value=o.learning_rate,
    warmup_steps=warmup,
    decay_steps=train.steps,
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
  return skipping.skip_bad_updates(optimizer, config.train.max_grad_norm_ratio)


def _muon(momentum: float) -> optax.GradientTransformation:
  """Orthogonalizes the momentum of matrices. Their axes are the last two of each parameter."""

  def matrix_axes(updates: optax.Updates) -> Any:
    return jax.tree.map(lambda a: contrib.MuonDimensionNumbers(a.ndim - 2, a.ndim - 1), updates)

  return contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=matrix_axes)
