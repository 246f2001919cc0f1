"""Diagnostics of a model whose density has diverged."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from farmer_jax.nn import farmer
from farmer_jax.nn import flow as flow_lib
from farmer_jax.ops.arrays import Labels, Values


def scale_ranges(
  model: farmer.Farmer, params: PyTree, images: Values, labels: Labels
) -> dict[str, Float[Array, '*T 2']]:
  """Returns the smallest and largest log-scales of a batch.

  `flow_log_scale` [T, 2], and `informative_log_scale` [2] and `redundant_log_scale` [2] of the
  mixtures, without the components that the model lacks.
  """
  model = model.bind({'params': params})
  ranges = {}
  if model.config.flow.blocks:
    ranges['flow_log_scale'] = _flow_ranges(model.flow, model.images_to_tokens(images), labels)
  if model.config.prior.kind == 'mixture':
    z, _ = model.encode(images, labels)
    informative = z[..., : model.prior.informative_channels]
    mixtures = model.prior.mixtures(informative, labels)
    for name, mixture in zip(('informative', 'redundant'), mixtures, strict=True):
      if mixture is not None:
        ranges[f'{name}_log_scale'] = _range(mixture.log_scales)
  return ranges


def _flow_ranges(flow: flow_lib.Flow, x: Array, labels: Array) -> Array:
  condition = flow.condition(labels)

  def step(x: Array, params: PyTree) -> tuple[Array, Array]:
    block = flow.bind_block(params)
    _, log_scale, _ = block.affine_parameters(x, condition)
    return block(x, condition)[0], _range(log_scale)  # XLA merges the two equal passes.

  return flow.scan_blocks(step, x)[1]


def _range(a: Array) -> Array:
  return jnp.stack([a.min(), a.max()])
