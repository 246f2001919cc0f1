"""Likelihood of held-out images."""

import functools

import jax
import jax.numpy as jnp

from farmer_jax import objectives
from farmer_jax.ops import bits, random


class LikelihoodEvaluator:
  """Mean negative log-likelihood of a split, conditional on the true labels.

  Noise depends on (seed, batch number) alone, so that values at different steps are comparable.
  Gaussian noise has its final standard deviation.
  """

  def __init__(self, model, config):
    self._config = config
    self._sums = jax.jit(functools.partial(_masked_sums, model=model, config=config))

  def __call__(self, params, batches):
    """Evaluates `params` on (image, label, mask) batches; returns a dict of floats, nats/dim.

    Under uniform dequantisation `bits_per_dim` is among them; under Gaussian noise it has no
    meaning, and `noise_std` says which density this is.
    """
    total: dict[str, float] = {}
    count = 0.0
    for index, batch in enumerate(batches):
      sums = jax.device_get(self._sums(params, batch, index))
      count += float(batch['mask'].sum())
      total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
    means = {name: value / count for name, value in total.items()}
    if self._config.noise.kind == 'uniform':
      means['bits_per_dim'] = bits.bits_per_dim(means['loss'])
    else:
      means['noise_std'] = self._config.noise.std_end
    return means


def _masked_sums(params, batch, index, *, model, config):
  """Sums over the real examples of a batch of each term in nats/dim."""
  key = random.named_key(config.seed, 'likelihood', index)
  images = objectives.real_valued(key, batch['image'], config.noise)
  log_density = model.apply({'params': params}, images, batch['label'])
  terms = objectives.nll_terms(log_density, images[0].size)
  # Padding must not turn a sum into nan, so it is cut out rather than multiplied by zero.
  mask = batch['mask'].astype(bool)
  return {name: jnp.where(mask, value, 0).sum() for name, value in terms.items()}
