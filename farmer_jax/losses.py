"""Training losses: the negative log-likelihood and the error of a distilled student."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from farmer_jax import config as config_lib
from farmer_jax import noise as noise_lib
from farmer_jax import sampling
from farmer_jax.nn import diagnostics, farmer, student
from farmer_jax.ops import random, units
from farmer_jax.ops.arrays import Images, Index, Labels, PerBlock, PerImage, Scalar, Tokens, Values

Params = dict[str, Any]
Batch = dict[str, Array]  # image: uint8 [B, H, W, C], label: int32 [B]
Metrics = dict[str, Float[Array, '']]
Features = Callable[[Params, Values], Sequence[Float[Array, 'B ...']]]


def nll_loss(
  params: Params,
  batch: Batch,
  step: Index,
  part: Index,
  *,
  model: farmer.Farmer,
  config: config_lib.Config,
) -> tuple[Float[Array, ''], Metrics]:
  """Negative log-likelihood of a training batch (arXiv 2510.23588) in nats/dim, and metrics.

  The random keys depend on the training step and on `part`, the index of the microbatch. The
  metrics are the loss, its three terms, the negative log-determinant of each flow block, the
  standard deviation of Gaussian noise if any is added, and bits_per_dim under uniform
  dequantization. While a curriculum adds noise, bits_per_dim does not bound a code length.
  """
  noise = noise_lib.for_training(config)
  images, labels = _training_inputs(batch, step, part, config)
  log_density: Any = model.apply({'params': params}, images, labels)
  dims = images[0].size
  metrics = {name: value.mean() for name, value in log_density.nll_terms(dims).items()}
  for block, log_det in enumerate(-log_density.log_dets.mean(1) / dims):
    metrics[f'log_det_block_{block}'] = log_det
  if noise.has_bits_per_dim:
    metrics['bits_per_dim'] = units.bits_per_dim(metrics['loss'])
  std = noise.training_std(step)
  if std is not None:
    metrics['noise_std'] = std
  return metrics['loss'], metrics


def nll_diagnostics(
  params: Params, batch: Batch, step: Index, *, model: farmer.Farmer, config: config_lib.Config
) -> dict[str, Array]:
  """Returns the terms of the loss [B], those of the flow blocks [T, B], and scale ranges."""
  images, labels = _training_inputs(batch, step, 0, config)
  log_density: Any = model.apply({'params': params}, images, labels)
  dims = images[0].size
  return {
    **log_density.nll_terms(dims),
    'log_det_blocks': -log_density.log_dets / dims,
    **diagnostics.scale_ranges(model, params, images, labels),
  }


def init_student(
  key: PRNGKeyArray, teacher: Params, *_: Params, model: student.StudentFarmer
) -> Params:
  """Returns the initial parameters of distillation, see `student.from_teacher`.

  With the objective `hidden`, the parameters include linear maps [T - 1, width, d] from hidden
  states to tokens. The parameters of the student are boxed with their logical axis names.
  """
  params = {'student': student.from_teacher(jax.random.fold_in(key, 1), teacher['flow'], model)}
  if model.distill.objective == 'hidden':
    blocks, width = model.config.flow.blocks, model.student_config.width
    d = model.config.token_channels(model.channels)
    kernel = jax.random.normal(key, (blocks - 1, width, d)) / jnp.sqrt(width)
    params['alignment'] = {'kernel': kernel, 'bias': jnp.zeros((blocks - 1, 1, 1, d))}
  return params


def student_errors(
  params: Params,
  teacher: Params,
  images: Values,
  labels: Labels,
  input_noise: Tokens | Scalar,
  noise_free: Values | None = None,
  *,
  model: student.StudentFarmer,
) -> tuple[PerBlock, Values]:
  """Returns mean squared errors of a student that inverts each block of the teacher in one pass.

  The targets are the teacher's flow outputs z⁰ … z^T. The student's blocks run in sequence from z^T
  plus `input_noise` to an estimate of z⁰ (arXiv 2510.23588, one-step distillation). With the
  objective `hidden`, linear maps of the student's hidden states are compared with the intermediate
  flow outputs, and only the final estimate of z⁰ is compared with the images (BiFlow, arXiv
  2512.10953). With `noise_free`, the final estimate is compared with these images.

  Row 0 of the errors is the error of the images. With `config.distill.normalize_targets`, the other
  rows are relative to the mean square of their targets. See `init_student` for `params`. Also
  returns the final estimate.
  """
  outputs: Any = model.apply({'params': teacher}, images, labels, method='flow_outputs')
  results: Any = model.apply(
    {'params': params}, outputs[-1] + input_noise, labels, method='student_outputs'
  )
  estimates, hidden = results
  final = outputs[0] if noise_free is None else model.images_to_tokens(noise_free)
  found, targets = estimates[1:], outputs[1:-1]
  if model.distill.objective == 'hidden':
    hidden, maps = hidden[1:].astype(outputs.dtype), params['alignment']
    highest = jax.lax.Precision.HIGHEST
    found = maps['bias'] + jnp.einsum('tbnw,twd->tbnd', hidden, maps['kernel'], precision=highest)
    targets = targets[:, :, -found.shape[2] :]  # the tokens that the hidden states affect
  errors = ((found - targets) ** 2).mean((2, 3))
  if model.distill.normalize_targets:
    errors /= (targets**2).mean((2, 3))
  final_errors = ((estimates[0] - final) ** 2).mean((1, 2))
  return jnp.concatenate([final_errors[None], errors]), model.tokens_to_images(estimates[0])


def perceptual_errors(
  features: Features, network: Params, images: Values, targets: Values
) -> PerImage:
  """Returns squared differences of features, relative to those of the targets.

  `features(network, images)` returns the outputs of layers, [B, …] each. The result is the mean
  over the layers, so that their sizes and scales do not matter.
  """

  def relative(a: Array, b: Array) -> PerImage:
    axes = tuple(range(1, a.ndim))
    # Few units of an unusual image may be active. The constant avoids a division by zero.
    return ((a - b) ** 2).mean(axes) / ((b**2).mean(axes) + 1e-6)

  layers = zip(features(network, images), features(network, targets), strict=True)
  return jnp.stack([relative(a, b) for a, b in layers]).mean(0)


def distillation_loss(
  params: Params,
  batch: Batch,
  step: Index,
  part: Index,
  teacher: Params,
  network: Params | None = None,
  *,
  model: student.StudentFarmer,
  config: config_lib.Config,
  features: Features | None = None,
) -> tuple[Float[Array, ''], Metrics]:
  """Mean squared error of a student on a training batch, see `student_errors`.

  A fraction `config.distill.generated_fraction` of the images is sampled from the teacher with the
  exact inverse, because at sampling time the student inverts latents of the prior. With `features`,
  the loss includes `perceptual_errors` with the parameters `network`.

  Returns the mean error over blocks, and metrics: this mean and the error of each block.
  """
  distill, labels = config.distill, batch['label']
  noise = noise_lib.for_training(config)
  key = functools.partial(_key, config, step, part)
  levels = random_flip(key('flip'), batch['image'], config.data)
  images = noise.evaluation_images(key('noise'), levels)
  noise_free = noise_lib.scaled(levels) if distill.denoise else None
  num_drawn = round(distill.generated_fraction * len(images))
  if num_drawn:
    keys = jax.random.split(key('drawn'), num_drawn)
    values = sampling.draw_values(teacher, labels[:num_drawn], keys, model=model, config=config)
    finite = jnp.isfinite(values).all((1, 2, 3), keepdims=True)
    values = jnp.where(finite, values, images[:num_drawn])
    images = jnp.concatenate([values, images[num_drawn:]])
  shape = (len(images), model.num_tokens, images[0].size // model.num_tokens)
  std = distill.input_noise_std * jax.random.uniform(key('input_noise_std'), (shape[0], 1, 1))
  input_noise = std * jax.random.normal(key('input_noise'), shape)
  all_errors, found = student_errors(
    params, teacher, images, labels, input_noise, noise_free, model=model
  )
  errors = all_errors.mean(1)
  metrics = {f'loss_block_{t}': error for t, error in enumerate(errors)}
  loss = errors.mean()
  if features is not None and network is not None:
    target = images if noise_free is None else noise_free
    metrics['loss_perceptual'] = perceptual_errors(features, network, found, target).mean()
    loss += distill.perceptual_weight * metrics['loss_perceptual']
  return loss, {'loss': loss, **metrics}


def _training_inputs(
  batch: Batch, step: Index, part: Index, config: config_lib.Config
) -> tuple[Values, Labels]:
  """Returns the inputs of the model for a training batch: random flips, noise, label dropout."""
  noise = noise_lib.for_training(config)
  key = functools.partial(_key, config, step, part)
  images, labels = random_flip(key('flip'), batch['image'], config.data), batch['label']
  dropped = jax.random.bernoulli(key('label_dropout'), config.model.label_dropout, labels.shape)
  labels = jnp.where(dropped, config.data.num_classes, labels)
  return noise.training_images(key('noise'), images, step), labels


def _key(config: config_lib.Config, step: Index, part: Index, name: str) -> PRNGKeyArray:
  return random.named_key(config.seed, name, step, part)


def random_flip(key: PRNGKeyArray, images: Images, data: config_lib.Data) -> Images:
  """Flips each image left to right with probability 1/2 if `data.flip` is set."""
  if not data.flip:
    return images
  flipped = jax.random.bernoulli(key, 0.5, images.shape[:1])
  return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
