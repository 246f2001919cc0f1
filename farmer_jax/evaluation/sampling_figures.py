"""Figures of samples: sweeps over sampling settings, and the path from latents to images.

All functions draw one named row for each label. All columns use the same random numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from farmer_jax import noise as noise_lib
from farmer_jax import sampling
from farmer_jax.config import Config
from farmer_jax.evaluation import figures
from farmer_jax.evaluation.figures import Picture
from farmer_jax.nn.farmer import Farmer

GUIDANCE_SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
REDUNDANT_VARIANCES = (0.0, 0.2, 0.4, 0.8, 1.0, 1.2, 1.5, 2.0, 4.0)

Params = dict[str, Any]
Labels = Sequence[int]
Names = Sequence[str]
Sizes = Sequence[int] | None  # chunk sizes, see `sampling.Sampler`
Images = UInt8[np.ndarray, 'B H W C']
Values = Float[Array, 'B H W C']


def guidance_sweep(
  model: Farmer, config: Config, params: Params, labels: Labels, names: Names, chunk_sizes: Sizes
) -> Picture:
  """Draws one column for each guidance scale in `GUIDANCE_SCALES`."""
  guidance = config.sampling.guidance
  method = 'resample' if guidance.method == 'none' else guidance.method
  # The compiled program includes guidance only if the configured scale is not 0.
  guidance = dataclasses.replace(guidance, method=method, scale=1.0)
  sampler = sampling.Sampler(model, config.with_sampling(guidance=guidance), chunk_sizes)
  columns = {f'w = {scale:g}': dict(scales=(scale, scale)) for scale in GUIDANCE_SCALES}
  return _sweep(sampler, params, labels, names, columns)


def redundant_variance_sweep(
  model: Farmer, config: Config, params: Params, labels: Labels, names: Names, chunk_sizes: Sizes
) -> Picture:
  """Draws one column for each factor on the variance of the redundant channels.

  All images of a row have the same informative channels.
  """
  sampler = sampling.Sampler(model, config, chunk_sizes)
  columns = {f'x {factor:g}': dict(variance=factor) for factor in REDUNDANT_VARIANCES}
  return _sweep(sampler, params, labels, names, columns)


def inversion_path(
  model: Farmer, config: Config, params: Params, labels: Labels, names: Names
) -> Picture:
  """Draws the tokens between the flow blocks: latents z^T on the left, the image z⁰ on the right.

  All tokens except the tokens of the image are rescaled to the range of gray levels.
  """
  z = sampling.Sampler(model, config).latents(params, labels, np.arange(len(labels)))

  @jax.jit
  def invert_block(z: Float[Array, 'B N d'], block: int) -> Float[Array, 'B N d']:
    arguments = z, jnp.asarray(labels, jnp.int32), block
    return model.apply({'params': params}, *arguments, method='invert_block')[0]

  tokens = model.final_flow_output(z)
  columns = {}
  for block in range(config.model.flow.blocks, -1, -1):  # number of blocks left to invert
    # Each block reverses the order of the tokens.
    values = model.tokens_to_images(tokens[:, ::-1] if block % 2 else tokens)
    columns[f'z^{block}'] = _rescale(values) if block else _quantize(config, values)
    if block:
      tokens = invert_block(tokens, block - 1)
  return figures.sample_grid(np.stack(list(columns.values()), 1), names, list(columns))


def student_comparison(
  model: Farmer, config: Config, params: Params, labels: Labels, names: Names
) -> Picture:
  """Draws images of the exact inverse and of the student's inverse, and their difference.

  Gray means no difference.
  """
  exact, student = (
    sampling.Sampler(model, config.with_sampling(inverse=inverse, denoise=False))
    for inverse in ('sequential', 'student')
  )
  z = exact.latents(params, labels, np.arange(len(labels)))
  samples = [sampler.images(params, z, labels) for sampler in (exact, student)]
  difference = _quantize(config, samples[1].values - samples[0].values)
  pictures = np.stack([samples[0].images, samples[1].images, difference], 1)
  return figures.sample_grid(pictures, names, ('exact', 'student', 'diff.'))


def _sweep(
  sampler: sampling.Sampler, params: Params, labels: Labels, names: Names, columns: dict[str, Any]
) -> Picture:
  """Draws a column for each item of `columns`, {title: arguments of `Sampler.latents`}."""
  numbers = np.arange(len(labels))
  latents = [sampler.latents(params, labels, numbers, **options) for options in columns.values()]
  images = [jax.device_get(sampler.images(params, z, labels).images) for z in latents]
  return figures.sample_grid(np.stack(images, 1), names, list(columns))


def _quantize(config: Config, values: Values) -> Images:
  return np.asarray(noise_lib.build(config.noise).quantize(values))


def _rescale(images: Values) -> Images:
  """Maps the middle 98 % of the values of each image to the range of gray levels."""
  values = np.asarray(images)
  low, high = np.quantile(values, (0.01, 0.99), axis=(1, 2, 3), keepdims=True)
  return (np.clip((values - low) / (high - low + 1e-9), 0, 1) * 255).astype(np.uint8)
