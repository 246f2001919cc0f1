"""What training minimises."""

import jax
import jax.numpy as jnp

from farmer_jax.ops import bits, dequantize, random


def real_valued(key, images, noise):  # uint8 [B, H, W, C]
  """Images as the model is evaluated on them: dequantised uniformly, or with the final noise."""
  if noise.kind == 'uniform':
    return dequantize.dequantize_uniform(key, images)
  return dequantize.dequantize_gaussian(key, images, noise.std_end)


def training_images(key, images, noise, noise_std):  # uint8 [B, H, W, C]
  """Images as the model is trained on them, with Gaussian noise of `noise_std` (may be traced)."""
  if noise.kind == 'gaussian':
    return dequantize.dequantize_gaussian(key, images, noise_std)
  key_bins, key_noise = jax.random.split(key)
  images = dequantize.dequantize_uniform(key_bins, images)
  if not noise.curriculum_std:
    return images
  return images + noise_std * jax.random.normal(key_noise, images.shape)


def nll_terms(log_density, dims):
  """A `LogDensity` as negative log-likelihoods in nats per dimension, [B] each.

  `loss` is the sum of the other three.
  """
  return {
    'loss': -log_density.total / dims,
    'nll_informative': -log_density.informative / dims,
    'nll_redundant': -log_density.redundant / dims,
    'log_det': -log_density.log_det / dims,
  }


def nll_loss(params, batch, step, part, *, model, config, noise_std):
  """Negative log-likelihood of a training batch, with dropped labels, noise and mirroring.

  Args:
    params: the model's parameters.
    batch: image uint8 [B, H, W, C] and label int32 [B].
    step: step of training; with `part` (of an accumulated batch) it names the randomness.
    part: see `step`.
    model: a `Farmer`.
    config: the whole `config.Config`.
    noise_std: standard deviation of Gaussian noise as a function of the step.

  Returns:
    The loss in nats/dim, and metrics: the loss, its three terms, the log-det of each block, the
    noise where there is some, and bits_per_dim under uniform dequantisation. (While a curriculum
    adds noise the latter bounds the code length of nothing: it shows the progress of training.)
  """

  def key(name):
    return random.named_key(config.seed, name, step, part)

  images, labels = batch['image'], batch['label']
  if config.data.flip:
    mirror = jax.random.bernoulli(key('flip'), 0.5, labels.shape)
    images = jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)
  dropped = jax.random.bernoulli(key('label_dropout'), config.model.label_dropout, labels.shape)
  labels = jnp.where(dropped, config.data.num_classes, labels)
  images = training_images(key('noise'), images, config.noise, noise_std(step))
  log_density = model.apply({'params': params}, images, labels)
  dims = images[0].size
  metrics = {name: value.mean() for name, value in nll_terms(log_density, dims).items()}
  for block, log_det in enumerate(-log_density.log_dets.mean(1) / dims):
    metrics[f'log_det_block_{block}'] = log_det
  if config.noise.kind == 'uniform':
    metrics['bits_per_dim'] = bits.bits_per_dim(metrics['loss'])
  if config.noise.kind == 'gaussian' or config.noise.curriculum_std:
    metrics['noise_std'] = noise_std(step)
  return metrics['loss'], metrics
