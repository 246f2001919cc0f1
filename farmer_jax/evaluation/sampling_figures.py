"""Pictures of what the controls of sampling do, and of the path from latents to images."""

import dataclasses

import jax
import numpy as np

from farmer_jax import sampling
from farmer_jax.evaluation import figures
from farmer_jax.ops import dequantize

GUIDANCE_SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
REDUNDANT_VARIANCES = (0.0, 0.2, 0.4, 0.8, 1.0, 1.2, 1.5, 2.0, 4.0)


def guidance(model, config, params, labels, names, chunks=None):
  """A row a label, a column a guidance scale; the same noise along a row.

  Args:
    model: a `farmer.Farmer`.
    config: `config.Config`; its guidance is used, with other scales.
    params: the model's parameters.
    labels: int [rows].
    names: of the rows.
    chunks: see `sampling.Sampler`.

  Returns:
    uint8 picture [H, W, 3].
  """
  settings = config.sampling.guidance
  method = 'resample' if settings.method == 'none' else settings.method
  settings = dataclasses.replace(settings, method=method, scale=1.0)
  sampler = sampling.Sampler(model, _with_sampling(config, guidance=settings), chunks)
  columns = [dict(scales=(scale, scale)) for scale in GUIDANCE_SCALES]
  titles = [f'w = {scale:g}' for scale in GUIDANCE_SCALES]
  return _sweep(sampler, params, labels, names, columns, titles)


def redundant(model, config, params, labels, names, chunks=None):
  """A row a label, a column a factor on the variance of the redundant channels; the same
  informative tokens along a row. Arguments as for `guidance`."""
  columns = [dict(variance=factor) for factor in REDUNDANT_VARIANCES]
  titles = [f'x {factor:g}' for factor in REDUNDANT_VARIANCES]
  sampler = sampling.Sampler(model, config, chunks)
  return _sweep(sampler, params, labels, names, columns, titles)


def path(model, config, params, labels, names):
  """A row a sample, a column a stage: latents z^T on the left, z^(T - 1) … z⁰, the image, on the
  right. Stages before the image are stretched to the range of grey levels. Arguments as above."""
  labels = np.asarray(labels, np.int32)
  z = sampling.Sampler(model, config).latents(params, labels, np.arange(len(labels)))

  @jax.jit
  def undo(z, block):
    return model.apply({'params': params}, z, labels, block, method='decode_block')[0]

  stages = [model.last_stage(z)]
  remaining = range(config.model.flow.blocks, -1, -1)  # blocks still to be undone, at each stage
  for block in remaining[1:]:
    stages.append(undo(stages[-1], block))
  pictures = []
  for blocks, stage in zip(remaining, stages, strict=True):
    # Each block turns the order of the tokens round.
    image = np.asarray(model.to_images(stage[:, ::-1] if blocks % 2 else stage))
    picture = _stretched(image) if blocks else dequantize.quantize(image, config.noise.kind)
    pictures.append(np.asarray(picture))
  return figures.sample_grid(np.stack(pictures, 1), names, [f'z^{blocks}' for blocks in remaining])


def student(model, config, params, labels, names):
  """A row a sample: the exact inverse, the student's, and the difference (grey: none). Arguments as
  above."""
  labels = np.asarray(labels, np.int32)
  exact, guessed = (
    sampling.Sampler(model, _with_sampling(config, inverse=inverse, denoise=False))
    for inverse in ('sequential', 'student')
  )
  z = exact.latents(params, labels, np.arange(len(labels)))
  drawn = [sampler.images(params, z, labels) for sampler in (exact, guessed)]
  difference = dequantize.quantize(drawn[1].values - drawn[0].values, config.noise.kind)
  pictures = np.stack([drawn[0].images, drawn[1].images, difference], 1)
  return figures.sample_grid(pictures, names, ('exact', 'student', 'diff.'))


def _sweep(sampler, params, labels, names, columns, titles):
  numbers = np.arange(len(labels))
  images = [
    sampler.images(params, sampler.latents(params, labels, numbers, **column), labels).images
    for column in columns
  ]
  return figures.sample_grid(np.stack(jax.device_get(images), 1), names, titles)


def _with_sampling(config, **changes):
  return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **changes))


def _stretched(images):
  """The middle 98 % of each image's values on the range of grey levels."""
  low, high = np.quantile(images, (0.01, 0.99), axis=(1, 2, 3), keepdims=True)
  return (np.clip((images - low) / (high - low + 1e-9), 0, 1) * 255).astype(np.uint8)
