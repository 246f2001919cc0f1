"""Small models with weights that look trained: an output layer of zeros would hide all mistakes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from farmer_jax import config, sampling
from farmer_jax.nn import flow, prior, transformer

SMALL = dict(layers=1, width=8, head_dim=4, mlp_ratio=2.0, dtype=jnp.dtype('float64'))


def make_transformer(**changes):
  return transformer.Transformer(**(SMALL | changes))


def make_block(**changes):
  return flow.FlowBlock(**(SMALL | dict(tokens=4, channels=2) | changes))


def make_flow(**changes):
  return flow.Flow(**(SMALL | dict(blocks=3, tokens=4, channels=2) | changes))


def make_prior(**changes):
  settings = dict(
    tokens=4,
    channels=3,
    num_classes=3,
    condition_copies=2,
    components=3,
    informative_channels=2,
    redundant='mixture',
    redundant_components=4,
    scale_floor=1e-3,
  )
  return prior.Prior(**(SMALL | settings | changes))


def model_settings(flow_changes=None, prior_changes=None, **changes):
  """The `config.Model` of a small model, changed here and there."""
  stack = dict(layers=1, width=8, head_dim=4, mlp_ratio=2.0)
  flow_settings = dict(blocks=2) | (flow_changes or {})
  prior_settings = dict(
    condition_copies=2, components=3, informative_channels=2, redundant_components=4
  ) | (prior_changes or {})
  return config.Model(
    **(dict(patch_size=2, dtype='float64') | changes),
    flow=config.Flow(**(stack | flow_settings)),
    prior=config.Prior(**(stack | prior_settings)),
  )


def filled_parameters(module, *args, seed=0):
  """Parameters of the shapes that `module` wants for `args`, every one of them random and non-zero.

  Kernels keep the size of their input, norms scale by about 1, everything else is moderate; so are
  the layers that give log-scales, lest a density be too wide or too narrow to integrate.
  """
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args)['params'])
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    names, normal = [key.key for key in path], rng.normal(size=leaf.shape)
    if {'out', 'out_proj'} & set(names):  # these read vectors of unit length
      value = (0.35 if names[-1] == 'kernel' else 0.15) * normal
    elif names[-1] == 'kernel':
      value = normal / leaf.shape[-2] ** 0.5
    elif names[-1] == 'scale':
      value = 1 + 0.3 * normal
    else:
      value = 0.4 * normal
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def make_draws(seed, batch, tokens):
  """Unguided draws for the prior."""
  keys = jax.random.split(jax.random.key(seed), batch)
  return sampling.Draws(keys, jnp.zeros(tokens), 1.0, config.Guidance())


def normals(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))
