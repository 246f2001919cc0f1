"""The likelihood of images, one by one and averaged.

The noise of an image is its own (`losses.evaluation_images`): but for rounding, no figure
depends on how images are batched or spread over devices.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from farmer_jax import losses
from farmer_jax.ops import bits


@flax.struct.dataclass
class Scores:
  """Negative log-likelihoods, an entry an image. Leading axes [draws, B] until they are averaged.

  `terms` add up to `loss`, nats/dim each: those of `losses.nll_terms` and, where the class is
  unknown, `nll_class`. Given the class after the fact, with its exact posterior, the others are
  averages, and `nll_class`, log C minus the posterior's entropy, is what is left.
  """

  loss: jax.Array  # [B], nats/dim
  terms: dict[str, jax.Array]  # [B] each, nats/dim
  log_dets: jax.Array  # [B, T], the part of each block in the term log_det, nats/dim
  tokens: jax.Array  # [B, N], of the informative channels of each token in raster order, nats
  log_classes: jax.Array | None  # [B, C], log p(x | c), nats; where the class is unknown


class Scorer:
  """Scores images, each under `draws` draws of the noise.

  Args:
    model: a `farmer.Farmer`.
    config: `config.Config`; its noise says what the density is of.
    draws: noise draws an image.
    condition: 'label' (given the class), 'none' (under the model's "no class") or 'marginal' (the
      class unknown, all equally likely: log mean_c p(x | c)).
    seed: of the noise.
  """

  def __init__(self, model, config, draws=1, condition='label', seed=0):
    self._model, self._noise = model, config.noise
    self._draws, self._condition, self._seed = draws, condition, seed

  def __call__(self, params, images, labels, indices):  # uint8 [B, H, W, C], int [B], int [B]
    """Returns a dict of arrays [B, ...].

    `loss`, `terms…`, `log_dets` and `tokens` as in `Scores`, averaged over the draws; of several
    draws of uniform dequantisation `loss_importance` too, the negative logarithm of the average
    density, nats/dim, whose bits/dim are a bound that is never looser (arXiv 1509.00519); with the
    class unknown `predicted`, the class of the highest likelihood.
    """

    def one_draw(draw):
      values = losses.evaluation_images(images, indices, self._noise, self._seed, draw)
      return self._density(params, values, labels)

    scores = jax.lax.map(one_draw, jnp.arange(self._draws))
    dims = images[0].size
    mean = jax.tree.map(lambda a: a.mean(0), scores)
    found = {'loss': mean.loss, **mean.terms, 'log_dets': mean.log_dets, 'tokens': mean.tokens}
    if self._noise.kind == 'uniform' and self._draws > 1:
      found['loss_importance'] = -_log_mean_exp(-scores.loss * dims) / dims
    if scores.log_classes is not None:
      # Bytes have one probability under each class; an average of noised images has none.
      uniform = self._noise.kind == 'uniform'
      joint = _log_mean_exp(scores.log_classes) if uniform else mean.log_classes
      found['predicted'] = joint.argmax(-1)
    return found

  def _density(self, params, images, labels):
    """The `Scores` of real-valued images."""
    dims, classes = images[0].size, self._model.num_classes
    if self._condition == 'marginal' and classes:
      return _marginal(self._by_class(params, images), dims)
    if self._condition != 'label':
      labels = jnp.full_like(labels, classes)
    density = self._model.apply({'params': params}, images, labels)
    terms = losses.nll_terms(density, dims)
    loss = terms.pop('loss')
    return Scores(loss, terms, -density.log_dets.T / dims, -density.tokens, None)

  def _by_class(self, params, images):
    """The `LogDensity` under each class, leading axis C."""
    model, variables = self._model, {'params': params}
    labels = jnp.zeros(len(images), jnp.int32)
    if model.settings.flow.class_conditional:
      given = functools.partial(model.apply, variables, images)
    else:
      encoded = model.apply(variables, images, labels, method='encode')
      given = functools.partial(model.apply, variables, *encoded, method='log_density')
    return jax.lax.map(lambda c: given(labels + c), jnp.arange(model.num_classes))


def _marginal(densities, dims):  # a LogDensity with a leading axis C
  """The `Scores` of images whose class is unknown."""
  log_classes = jax.vmap(lambda density: density.total)(densities)  # [C, B]
  posterior = jax.nn.softmax(log_classes, axis=0)

  def average(values):  # [C, B, ...] -> [B, ...]
    weights = posterior.reshape(*posterior.shape, *(1,) * (values.ndim - 2))
    # A class that is impossible may have infinite terms.
    return jnp.where(weights > 0, weights * values, 0).sum(0)

  terms = jax.vmap(functools.partial(losses.nll_terms, dims=dims))(densities)
  del terms['loss']
  terms = jax.tree.map(average, terms)
  entropy = jax.scipy.special.entr(posterior).sum(0)
  terms['nll_class'] = (math.log(len(log_classes)) - entropy) / dims
  return Scores(
    loss=-_log_mean_exp(log_classes) / dims,
    terms=terms,
    log_dets=-average(densities.log_dets.swapaxes(1, 2)) / dims,
    tokens=-average(densities.tokens),
    log_classes=log_classes.T,
  )


def _log_mean_exp(values):  # [k, ...]
  return jax.nn.logsumexp(values, axis=0) - math.log(len(values))


class LikelihoodEvaluator:
  """Mean negative log-likelihood of a split, conditional on the true labels, one draw an image:
  what training validates with. Gaussian noise has its final standard deviation."""

  def __init__(self, model, config):
    self._config = config
    self._sums = jax.jit(
      functools.partial(_masked_sums, score=Scorer(model, config, seed=config.seed))
    )

  def __call__(self, params, batches):
    """Evaluates `params` on (image, label, index, mask) batches; returns a dict of floats,
    nats/dim.

    Under uniform dequantisation `bits_per_dim` is among them; under Gaussian noise it has no
    meaning, and `noise_std` says which density this is.
    """
    total: dict[str, float] = {}
    for batch in batches:
      sums = jax.device_get(self._sums(params, batch))
      total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
    count = total.pop('count')
    means = {name: value / count for name, value in total.items()}
    if self._config.noise.kind == 'uniform':
      means['bits_per_dim'] = bits.bits_per_dim(means['loss'])
    else:
      means['noise_std'] = self._config.noise.std_end
    return means


def _masked_sums(params, batch, *, score):
  """Sums over the real examples of a batch of each term in nats/dim, and their `count`."""
  found = score(params, batch['image'], batch['label'], batch['index'])
  # Padding must not turn a sum into nan, so it is cut out rather than multiplied by zero.
  mask = batch['mask'].astype(bool)
  names = ('loss', 'nll_informative', 'nll_redundant', 'log_det')
  return {name: jnp.where(mask, found[name], 0).sum() for name in names} | {'count': mask.sum()}
