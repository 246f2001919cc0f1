"""Tiny models with random parameters, because zero output layers would hide errors."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from farmer_jax import config
from farmer_jax.nn import flow, prior, transformer
from farmer_jax.ops import guidance

_STACK = dict(layers=1, width=8, head_dim=4, mlp_ratio=2.0)
_PRIOR = dict(condition_copies=2, components=3, informative_channels=2, redundant_components=4)


def replace(config, **changes):
  """Works like `dataclasses.replace`. A dict contains changes of the keys of a section."""
  sections = {key: value for key, value in changes.items() if isinstance(value, dict)}
  changed = {key: replace(getattr(config, key), **value) for key, value in sections.items()}
  return dataclasses.replace(config, **changes | changed)


def _split(section_class, values):
  """Builds a configuration section and a `StackConfig` from one dict with the keys of both."""
  values = _STACK | values
  fields = {field.name for field in dataclasses.fields(section_class)}
  section = section_class(**{key: value for key, value in values.items() if key in fields})
  stack = {key: value for key, value in values.items() if key in _STACK or key not in fields}
  return section, _stack_config(**stack)


def _stack_config(mlp_ratio, dtype='float64', **values):
  mlp_width = int(mlp_ratio * values['width'])
  return transformer.StackConfig(mlp_width=mlp_width, dtype=jnp.dtype(dtype), **values)


def make_transformer(causal=True, **changes):
  return transformer.Transformer(_stack_config(**_STACK | changes), causal)


def make_block(num_tokens=4, channels=2, block_class=flow.FlowBlock, **changes):
  return block_class(*_split(config.Flow, changes), num_tokens, channels)


def make_flow(num_tokens=4, channels=2, num_classes=0, flow_class=flow.Flow, **changes):
  """Returns a flow, which is class-conditional if there are classes."""
  changes = dict(blocks=3, class_conditional=num_classes > 0) | changes
  return flow_class(*_split(config.Flow, changes), num_tokens, channels, num_classes)


def make_prior(num_tokens=4, channels=3, num_classes=3, **changes):
  return prior.Prior(*_split(config.Prior, _PRIOR | changes), num_tokens, channels, num_classes)


def model_config(flow_changes=None, prior_changes=None, **changes):
  """Returns the section `model` of the configuration of a tiny model."""
  return config.Model(
    **(dict(patch_size=2, dtype='float64') | changes),
    flow=config.Flow(**(_STACK | dict(blocks=2) | (flow_changes or {}))),
    prior=config.Prior(**(_STACK | _PRIOR | (prior_changes or {}))),
  )


def filled_parameters(module, *args, seed=0, method='__call__'):
  """Returns random parameters without zeros. `args` are arguments of a method of `module`.

  Kernels preserve the size of their input, and norms scale by about 1. The outputs of projections
  to log-scales are small enough that densities can be integrated.
  """
  init = functools.partial(module.init, method=method)
  shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), *args)['params'])
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    names, normal = [key.key for key in path], rng.normal(size=leaf.shape)
    if {'shift_proj', 'log_scale_proj', 'logits', 'means', 'log_scales'} & set(names):
      # Shifts and means read hidden states that are not normalized.
      size = 0.15 if {'shift_proj', 'means'} & set(names) else 0.35
      value = (size / leaf.shape[-2] ** 0.5 if names[-1] == 'kernel' else 0.15) * normal
    elif names[-1] == 'kernel':
      value = normal / leaf.shape[-2] ** 0.5
    elif names[-1] == 'scale':
      value = 1 + 0.3 * normal
    else:
      value = 0.4 * normal
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def mixture_log_prob(mixture, z):
  """Computes a log-density in NumPy. Leading axes of mixtures and points broadcast."""
  scales = np.exp(mixture.log_scales)
  components = stats.norm.logpdf(z[..., None, :], mixture.means, scales).sum(-1)
  return special.logsumexp(special.log_softmax(mixture.logits, axis=-1) + components, axis=-1)


def mixture_cdf(mixture, z, channel=0):
  """Computes the cumulative distribution function of one channel in NumPy."""
  means, log_scales = mixture.means[..., channel], mixture.log_scales[..., channel]
  components = stats.norm.cdf(z[..., None], means, np.exp(log_scales))
  return (components * special.softmax(mixture.logits, axis=-1)).sum(-1)


class Compiled:
  """A module with parameters of `filled_parameters`, and its compiled methods.

  `model('encode')(x)` applies the method `encode`, and `model('encode', params)(x)` uses other
  parameters. Calls with the same method share the compiled program. `model.apply` compiles nothing.
  """

  def __init__(self, module, *args, seed=0):
    self.module, self.params = module, filled_parameters(module, *args, seed=seed)

  def __call__(self, method='__call__', params=None):
    return functools.partial(self._jit(method), self.params if params is None else params)

  def apply(self, *args, method='__call__', params=None):
    params = self.params if params is None else params
    return self.module.apply({'params': params}, *args, method=method)

  @functools.cache  # noqa: B019
  def _jit(self, method):
    return jax.jit(lambda params, *args: self.apply(*args, method=method, params=params))


def make_draws(seed, batch, num_tokens):
  """Returns draws without guidance."""
  keys = jax.random.split(jax.random.key(seed), batch)
  return guidance.GuidedDraws(keys, jnp.zeros(num_tokens), 1.0, config.Guidance())


def normals(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))
