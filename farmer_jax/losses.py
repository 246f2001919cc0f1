"""What training minimises."""

import jax
import jax.numpy as jnp

from farmer_jax import sampling
from farmer_jax.nn import farmer
from farmer_jax.ops import bits, dequantize, random


def real_valued(key, images, noise):  # uint8 [B, H, W, C]
  """Images as the model is evaluated on them: dequantised uniformly, or with the final noise."""
  if noise.kind == 'uniform':
    return dequantize.dequantize_uniform(key, images)
  return dequantize.dequantize_gaussian(key, images, noise.std_end)


def evaluation_images(images, indices, noise, seed, draw=0):  # uint8 [B, H, W, C], int [B]
  """Images as the model is evaluated on them. The noise of each depends on the seed, its place in
  the data and the number of the draw, not on how images are batched or spread over devices."""

  def dequantize_one(image, index):
    return real_valued(random.named_key(seed, 'evaluation', index, draw), image, noise)

  return jax.vmap(dequantize_one)(images, indices)


def training_images(key, images, noise, noise_std):  # uint8 [B, H, W, C]
  """Images as the model is trained on them, with Gaussian noise of `noise_std` (may be traced)."""
  if noise.kind == 'gaussian':
    return dequantize.dequantize_gaussian(key, images, noise_std)
  key_bins, key_noise = jax.random.split(key)
  images = dequantize.dequantize_uniform(key_bins, images)
  if not noise.curriculum_std:
    return images
  return images + noise_std * jax.random.normal(key_noise, images.shape)


def _mirrored(key, images, data):
  """Images of which half are mirrored, where the configuration says so."""
  if not data.flip:
    return images
  mirror = jax.random.bernoulli(key, 0.5, images.shape[:1])
  return jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)


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


def _as_trained(batch, step, part, config, noise_std):
  """A batch as the model sees it in training: mirrored, noised, some labels dropped."""

  def key(name):
    return random.named_key(config.seed, name, step, part)

  images, labels = _mirrored(key('flip'), batch['image'], config.data), batch['label']
  dropped = jax.random.bernoulli(key('label_dropout'), config.model.label_dropout, labels.shape)
  labels = jnp.where(dropped, config.data.num_classes, labels)
  return training_images(key('noise'), images, config.noise, noise_std(step)), labels


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

  images, labels = _as_trained(batch, step, part, config, noise_std)
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


def nll_extremes(params, batch, step, *, model, config, noise_std):
  """What tells where a density has gone astray, of a batch as `nll_loss` sees its first part.

  Returns:
    A dict of arrays: the terms in nats/dim, [B] each (`nll_terms`); `log_det_blocks` [T, B]; and
    the logarithms of the lowest and the highest scales (`Farmer.ranges`).
  """
  images, labels = _as_trained(batch, step, 0, config, noise_std)
  log_density = model.apply({'params': params}, images, labels)
  dims = images[0].size
  ranges = model.apply({'params': params}, images, labels, method='ranges')
  terms = nll_terms(log_density, dims)
  return {**terms, 'log_det_blocks': -log_density.log_dets / dims, **ranges}


def init_student(key, teacher, *, model, objective):
  """What distillation starts from: a copy of the teacher's flow, in boxes with the names of its
  axes, and for the objective hidden linear maps [T, width, d] from hidden states to tokens."""
  flow = farmer.with_names(teacher, model)['flow']
  params = {'student': jax.tree.map(jnp.copy, flow)}
  if objective == 'hidden':
    blocks, width = model.settings.flow.blocks, model.settings.flow.width
    d = model.channels * model.settings.patch_size**2
    kernel = jax.random.normal(key, (blocks - 1, width, d)) / jnp.sqrt(width)
    params['alignment'] = {'kernel': kernel, 'bias': jnp.zeros((blocks - 1, 1, 1, d))}
  return params


def student_errors(params, teacher, images, labels, noise, *, model, objective):
  """How far a student is from undoing the teacher's flow.

  The teacher runs forward alone, its stages z⁰ … z^T are the targets; the student's blocks run one
  after the other from z^T to its guess of z⁰ (arXiv 2510.23588, one-step distillation). With the
  objective hidden it is linear maps of the blocks' hidden states that are held to the stages, all
  but the last: the student's tokens may take a way of their own (BiFlow, arXiv 2512.10953).

  Args:
    params: as `init_student` gives them.
    teacher: the teacher's parameters.
    images: real-valued [B, H, W, C].
    labels: int [B].
    noise: [B, N, d], added to the student's input, or 0.
    model: a `Farmer`.
    objective: `config.Distill.objective`.

  Returns:
    Mean squared errors [T, B]; the first are those of the images.
  """
  stages = model.apply({'params': teacher}, images, labels, method='stages')
  last = stages[-1] + noise
  guesses, hidden = model.apply({'params': params}, last, labels, method='guess_stages')
  errors = ((guesses - stages[:-1]) ** 2).mean((2, 3))
  if objective == 'hidden':
    # Hidden states are of unit length; the one that acts on token i + 1 stands at i.
    hidden = hidden[1:].astype(stages.dtype) * jnp.sqrt(hidden.shape[-1])
    maps = params['alignment']
    aligned = jnp.einsum('tbnw,twd->tbnd', hidden, maps['kernel']) + maps['bias']
    aligned_errors = ((aligned - stages[1:-1, :, 1:]) ** 2).mean((2, 3))
    errors = jnp.concatenate([errors[:1], aligned_errors])
  return errors


def distillation_loss(params, batch, step, part, teacher, *, model, config):
  """Mean squared error of a student on a training batch: see `student_errors`.

  A share `config.distill.drawn_share` of the images is drawn from the teacher, by its exact
  inverse: sampling will meet the prior's latents, not those of real images.

  Args:
    params: as `init_student` gives them.
    batch: image uint8 [B, H, W, C] and label int32 [B].
    step: step of training; with `part` (of an accumulated batch) it names the randomness.
    part: see `step`.
    teacher: the teacher's parameters.
    model: a `Farmer`.
    config: the whole `config.Config`.

  Returns:
    The mean over blocks, and metrics: it and each block's error.
  """

  def key(name):
    return random.named_key(config.seed, name, step, part)

  settings, labels = config.distill, batch['label']
  images = _mirrored(key('flip'), batch['image'], config.data)
  images = real_valued(key('noise'), images, config.noise)
  drawn = round(settings.drawn_share * len(images))
  if drawn:
    keys = jax.random.split(key('drawn'), drawn)
    values = sampling.draw_values(teacher, labels[:drawn], keys, model=model, config=config)
    finite = jnp.isfinite(values).all((1, 2, 3), keepdims=True)
    values = jnp.where(finite, values, images[:drawn])
    images = jnp.concatenate([values, images[drawn:]])
  size = (len(images), model.tokens, images[0].size // model.tokens)
  largest = settings.input_noise * jax.random.uniform(key('input_noise_std'), (size[0], 1, 1))
  noise = largest * jax.random.normal(key('input_noise'), size)
  errors = student_errors(
    params, teacher, images, labels, noise, model=model, objective=settings.objective
  ).mean(1)
  loss = errors.mean()
  return loss, {'loss': loss, **{f'loss_block_{t}': error for t, error in enumerate(errors)}}
