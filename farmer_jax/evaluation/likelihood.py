"""The likelihood of each image.

Except for rounding, results do not depend on batches or devices, see `noise.evaluation_images`.

Axes: B batch, N tokens, T flow blocks, C classes.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from farmer_jax import config as config_lib
from farmer_jax import noise as noise_lib
from farmer_jax.nn import farmer, layers

Params = dict[str, Any]
Scores = dict[str, Array]
Labels = Int[Array, 'B']
Values = Float[Array, 'B H W C']


@dataclasses.dataclass(eq=False)
class Scorer:
  """Computes the likelihood of each image, averaged over noise draws.

  `config.noise` defines the density. `condition` is 'label' (the class of the image), 'none' (the
  label "no class") or 'marginal' (all classes are equally likely: log mean_c p(x | c)).
  """

  model: farmer.Farmer
  config: config_lib.Config
  draws: int = 1
  condition: str = 'label'
  seed: int = 0

  def __call__(
    self, params: Params, images: UInt8[Array, 'B H W C'], labels: Labels, indices: Int[Array, 'B']
  ) -> Scores:
    """Scores a batch of images. Their indices in the data source select the noise.

    Can be compiled with `jax.jit`.

    Returns:
      Means over the draws:
        `loss` [B]: negative log-likelihood in nats/dim.
        Terms [B] that add up to the loss: the terms of `LogDensity.nll_terms` and, for 'marginal',
          `nll_class`, which is log C minus the entropy of the posterior of the class. In this case
          the other terms are means over the posterior.
        `log_dets` [B, T]: terms of the flow blocks in `log_det`, in nats/dim.
        `tokens` [B, N]: terms of the tokens in `nll_informative`, in raster order, in nats.
      `loss_importance` [B], for several draws of uniform dequantization: negative logarithm of the
        mean density in nats/dim. This bound is at least as tight as `loss` (arXiv 1509.00519).
      `predicted` [B], for 'marginal': the class with the highest likelihood.
    """

    noise = noise_lib.build(self.config.noise)
    params = layers.cast_params(params, self.config.model.dtype)

    def one_draw(draw: Int[Array, '']) -> Scores:
      values = noise_lib.evaluation_images(noise, images, indices, self.seed, draw)
      return self._score(params, values, labels)

    scores = jax.lax.map(one_draw, jnp.arange(self.draws))  # leading axis: draws
    log_classes = scores.pop('log_classes', None)
    result = {name: values.mean(0) for name, values in scores.items()}
    dims, discrete = images[0].size, noise.has_bits_per_dim
    if discrete and self.draws > 1:
      result['loss_importance'] = -jax.nn.logmeanexp(-scores['loss'] * dims, axis=0) / dims
    if log_classes is not None:
      # The mean density over draws estimates the probability of a discrete image. Draws of Gaussian
      # noise are different images, so their log-densities are averaged.
      joint = jax.nn.logmeanexp(log_classes, axis=0) if discrete else log_classes.mean(0)
      result['predicted'] = joint.argmax(-1)
    return result

  def _score(self, params: Params, images: Values, labels: Labels) -> Scores:
    """Returns the scores of one draw and, for 'marginal', log p(x | c) [B, C] in nats."""
    dims, num_classes = images[0].size, self.model.num_classes
    if self.condition == 'marginal' and num_classes:
      return _marginalize(self._densities_by_class(params, images), dims)
    if self.condition != 'label':
      labels = jnp.full_like(labels, num_classes)
    density: Any = self.model.apply({'params': params}, images, labels)
    tokens, log_dets = -density.tokens, -density.log_dets.T / dims
    return {**density.nll_terms(dims), 'tokens': tokens, 'log_dets': log_dets}

  def _densities_by_class(self, params: Params, images: Values) -> farmer.LogDensity:
    """Returns log-densities given each class, with a leading axis C."""
    model, variables = self.model, {'params': params}
    labels = jnp.zeros(len(images), jnp.int32)
    if model.config.flow.class_conditional:
      log_density = functools.partial(model.apply, variables, images)
    else:  # All classes share one pass through the flow.
      latents = model.apply(variables, images, labels, method='encode')
      log_density = functools.partial(model.apply, variables, *latents, method='log_density')
    return jax.lax.map(lambda c: log_density(labels + c), jnp.arange(model.num_classes))


def _marginalize(densities: farmer.LogDensity, dims: int) -> Scores:
  """Returns the scores for 'marginal' from log-densities with a leading axis C."""
  log_classes = jax.vmap(lambda density: density.total)(densities)  # [C, B]
  posterior = jax.nn.softmax(log_classes, axis=0)

  def average(values: Float[Array, 'C B ...']) -> Float[Array, 'B ...']:
    weights = posterior.reshape(*posterior.shape, *(1,) * (values.ndim - 2))
    # The terms of a class with probability 0 can be infinite.
    return jnp.where(weights > 0, weights * values, 0).sum(0)

  terms = jax.vmap(lambda density: density.nll_terms(dims))(densities)
  entropy = jax.scipy.special.entr(posterior).sum(0)
  return {
    **jax.tree.map(average, terms),
    'loss': -jax.nn.logmeanexp(log_classes, axis=0) / dims,
    'nll_class': (math.log(len(log_classes)) - entropy) / dims,
    'log_dets': -average(densities.log_dets.swapaxes(1, 2)) / dims,
    'tokens': -average(densities.tokens),
    'log_classes': log_classes.T,
  }
