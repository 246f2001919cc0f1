"""Figures of samples: sweeps over sampling settings, and the path from latents to images."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from farmer_jax import noise as noise_lib
from farmer_jax import sampling
from farmer_jax.config import Config
from farmer_jax.evaluation import figures
from farmer_jax.evaluation.figures import Picture
from farmer_jax.nn.farmer import Farmer

GUIDANCE_SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
REDUNDANT_VARIANCES = (0.0, 0.2, 0.4, 0.8, 1.0, 1.2, 1.5, 2.0, 4.0)

Columns = Mapping[str, UInt8[Array | np.ndarray, 'rows H W C']]  # {title: images}


@dataclasses.dataclass(frozen=True)
class SamplingFigures:
  """Draws figures with one named row for each label. All columns use the same random numbers.

  See `sampling.Sampler` for `chunk_sizes`.
  """

  model: Farmer
  config: Config
  params: dict[str, Any]
  labels: Sequence[int]
  names: Sequence[str]
  chunk_sizes: Sequence[int] | None = None

  def draw_supported(self) -> dict[str, Picture]:
    """Draws all figures that the model supports, by name."""
    model, prior = self.config.model, self.config.model.prior
    pictures = {}
    if self.config.supports_guidance:
      pictures['guidance'] = self.guidance_sweep()
    if prior.kind == 'mixture' and prior.informative_channels:
      pictures['redundant'] = self.redundant_variance_sweep()
    if model.flow.blocks:
      pictures['denoising_path'] = self.inversion_path()
    if self.config.teacher is not None:
      pictures['student'] = self.student_comparison()
    return pictures

  def guidance_sweep(self) -> Picture:
    """Draws one column for each guidance scale in `GUIDANCE_SCALES`."""
    # The compiled program includes guidance only if the configured scale is not 0.
    guidance = self.config.sampling.guidance.with_scale(1.0)
    columns = {f'w = {scale:g}': dict(scales=(scale, scale)) for scale in GUIDANCE_SCALES}
    return self._sweep(columns, guidance=guidance)

  def redundant_variance_sweep(self) -> Picture:
    """Draws one column for each factor on the variance of the redundant channels.

    All images of a row have the same informative channels.
    """
    columns = {f'x {factor:g}': dict(variance=factor) for factor in REDUNDANT_VARIANCES}
    return self._sweep(columns)

  def inversion_path(self) -> Picture:
    """Draws the tokens between the flow blocks: latents z^T on the left, the image z⁰ on the right.

    All tokens except the tokens of the image are rescaled to the range of gray levels.
    """
    model, labels = self.model, jnp.asarray(self.labels, jnp.int32)

    @jax.jit
    def invert_block(params: Any, z: Float[Array, 'B N d'], block: int) -> Float[Array, 'B N d']:
      return model.apply({'params': params}, z, labels, block, method='invert_block')[0]

    tokens = model.final_flow_output(self._latents(sampling.Sampler(model, self.config)))
    columns = {}
    for block in range(self.config.model.flow.blocks, 0, -1):  # number of blocks left to invert
      in_order = model.flow_output_in_order(tokens, block)
      columns[f'z^{block}'] = _rescale(model.tokens_to_images(in_order))
      tokens = invert_block(self.params, tokens, block - 1)
    columns['z^0'] = self._quantize(model.tokens_to_images(tokens))
    return self._grid(columns)

  def student_comparison(self) -> Picture:
    """Draws images of the exact inverse and of the student's inverse, and their difference.

    Gray means no difference. Both are denoised if the student removes the noise.
    """
    denoise = self.config.distill.denoise
    samplers = [
      sampling.Sampler(self.model, self.config.with_sampling(inverse=inverse, denoise=denoise))
      for inverse in ('sequential', 'student')
    ]
    z = self._latents(samplers[0])
    exact, student = (sampler.images(self.params, z, self.labels) for sampler in samplers)
    difference = self._quantize(student.values - exact.values)
    return self._grid({'exact': exact.images, 'student': student.images, 'diff.': difference})

  def _latents(self, sampler: sampling.Sampler, **options: Any) -> Float[Array, 'B N d']:
    return sampler.latents(self.params, self.labels, np.arange(len(self.labels)), **options)

  def _sweep(self, columns: dict[str, dict[str, Any]], **settings: Any) -> Picture:
    """Draws a column for each item of `columns`, {title: arguments of `Sampler.latents`}."""
    config = self.config.with_sampling(**settings)
    sampler = sampling.Sampler(self.model, config, self.chunk_sizes)
    latents = {title: self._latents(sampler, **options) for title, options in columns.items()}
    return self._grid(
      {title: sampler.images(self.params, z, self.labels).images for title, z in latents.items()}
    )

  def _grid(self, columns: Columns) -> Picture:
    images = np.stack(jax.device_get(list(columns.values())), 1)
    return figures.sample_grid(images, self.names, list(columns))

  def _quantize(self, values: Float[Array, 'B H W C']) -> UInt8[np.ndarray, 'B H W C']:
    return np.asarray(noise_lib.build(self.config.noise).quantize(values))


def by_log_det(
  log_dets: Float[np.ndarray, 'n'],
) -> tuple[list[str], Int[np.ndarray, 'rows columns']]:
  """Selects up to 32 samples each with the lowest, median and highest finite `log_dets`, sorted.

  Returns the names of the rows of a figure, and the indices of the samples of each row. According
  to the paper (arXiv 2510.23588, Figure 8), samples with abnormal log-determinants are blurred.
  """
  finite = np.flatnonzero(np.isfinite(log_dets))
  order = finite[np.argsort(log_dets[finite], kind='stable')]
  size = min(32, max(len(order) // 3, min(len(order), 1)))
  columns = max(1, min(8, size))
  size, middle = size - size % columns, len(order) // 2
  starts = {'lowest': 0, 'median': middle - size // 2, 'highest': len(order) - size}
  rows = np.stack([order[start : start + size] for start in starts.values()]).reshape(-1, columns)
  values = log_dets[rows]
  groups = np.repeat(list(starts), size // columns)
  ranges = zip(groups, values[:, 0], values[:, -1], strict=True)
  return [f'{name} log_det: {low:.3f} to {high:.3f} nats/dim' for name, low, high in ranges], rows


def _rescale(images: Float[Array, 'B H W C']) -> UInt8[np.ndarray, 'B H W C']:
  """Maps the middle 98 % of the values of each image to the range of gray levels."""
  values = np.asarray(images)
  low, high = np.quantile(values, (0.01, 0.99), axis=(1, 2, 3), keepdims=True)
  return (np.clip((values - low) / (high - low + 1e-9), 0, 1) * 255).astype(np.uint8)
