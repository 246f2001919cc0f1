"""Draws images: latents from the prior, with or without guidance, then the inverse of the flow.

Axis letters as in `ops.arrays`: S = 1, or 2 under guidance ("class" and "no class").
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from farmer_jax import noise
from farmer_jax.config import Config, Sampling
from farmer_jax.nn import layers
from farmer_jax.nn.farmer import Farmer
from farmer_jax.ops import guidance as guidance_lib
from farmer_jax.ops import random
from farmer_jax.ops.arrays import Images, PerBlock, PerImage, Scalar, Tokens, Values

Ints = Int[Array, 'B']
Labels = Ints | np.ndarray | Sequence[int]  # `num_classes` is "no class"


def draw_latents(
  params: PyTree,
  labels: Ints,
  keys: PRNGKeyArray,
  scales: Float[Array, '2'],
  variance: Scalar,
  *,
  model: Farmer,
  config: Config,
) -> tuple[Tokens, guidance_lib.EffectiveSizes]:
  """Draws latents z from the prior, with one random key per image. `Sampler.latents` compiles it.

  Also returns the effective sizes of the pools of candidates, for guidance by resampling.

  `scales` are the guidance scales at the first and at the last token, interpolated linearly in
  between. They have no effect unless `config.sampling.guidance` has a scale above 0. `variance` is
  a factor on the variance of the redundant channels.
  """
  guidance = config.sampling.guidance
  streams = [labels]
  if guidance.active:
    streams.append(jnp.full_like(labels, config.data.num_classes))
  token_scales = jnp.linspace(scales[0], scales[1], model.num_tokens)
  draws = guidance_lib.GuidedDraws(keys, token_scales, variance, guidance)
  drawn: Any = model.apply({'params': params}, jnp.stack(streams), draws, method='sample')
  return drawn


def draw_values(
  params: PyTree, labels: Ints, keys: PRNGKeyArray, *, model: Farmer, config: Config
) -> Values:
  """Draws real-valued images with the exact inverse. See `draw_latents` for the arguments."""
  scales = jnp.asarray(config.sampling.guidance.scales)
  z, _ = draw_latents(
    params, labels, keys, scales, config.sampling.redundant_variance, model=model, config=config
  )
  return model.apply({'params': params}, z, labels, method='decode')[0]


@flax.struct.dataclass
class Samples:
  """A batch of samples and convergence statistics of the inverse of the flow."""

  values: Values  # on the scale of the training data
  noisy: Values  # `values` before the denoising step
  images: Images  # gray where `values` are not finite
  finite: Bool[Array, 'B']  # whether all values of an image are finite
  residual: PerImage  # largest residual of the flow blocks, see `flow.Convergence`
  passes: PerBlock  # passes over the tokens, see `flow.Convergence`


def in_sampling_dtype(model: Farmer, sampling: Sampling) -> Farmer:
  """Returns `model` with its transformers in the dtype `config.sampling.dtype`.

  The default replaces bfloat16 by float32. The forward pass and the inverse process arrays of
  different shapes and therefore round differently, and deep flows amplify the difference.
  """
  dtype = sampling.dtype or ('float32' if model.config.dtype == 'bfloat16' else None)
  if dtype is None:
    return model
  return model.clone(config=dataclasses.replace(model.config, dtype=dtype))


class Sampler:
  """Draws images. The random numbers of image i depend only on `config.sampling.seed` and i.

  Args:
    model: the model, a `student.StudentFarmer` if `config.sampling.inverse` is 'student'.
    config: the section `sampling` defines how to draw.
    chunk_sizes: of each flow block, see `flow.Flow.inverse`.
    out_shardings: sharding of the results, see `jax.jit`.
  """

  def __init__(
    self,
    model: Farmer,
    config: Config,
    chunk_sizes: Sequence[int] | None = None,
    out_shardings: Any = None,
  ):
    self._model, self._config = in_sampling_dtype(model, config.sampling), config
    self._chunk_sizes = chunk_sizes
    self._latents_and_sizes = jax.jit(self._draw, out_shardings=out_shardings)
    self._images = jax.jit(self._decode, out_shardings=out_shardings)
    self._densities = jax.jit(self._nll_terms, out_shardings=out_shardings)

  def __call__(self, params: PyTree, labels: Labels, indices: Labels) -> Samples:
    """Draws the images with the given indices."""
    return self.images(params, self.latents(params, labels, indices), labels)

  def latents(
    self,
    params: PyTree,
    labels: Labels,
    indices: Labels,
    scales: tuple[float, float] | None = None,
    variance: float | None = None,
  ) -> Tokens:
    """Draws latents z. `scales` and `variance`, see `draw_latents`, replace configured values."""
    return self._latents_and_sizes(params, *self._arguments(labels, indices, scales, variance))[0]

  def effective_sizes(
    self, params: PyTree, labels: Labels, indices: Labels
  ) -> guidance_lib.EffectiveSizes:
    """Returns the effective sizes of the pools from which `latents` chooses, with guidance."""
    return self._latents_and_sizes(params, *self._arguments(labels, indices))[1]

  def images(self, params: PyTree, z: Tokens, labels: Labels) -> Samples:
    """Inverts the flow. Returns the samples with latents z."""
    return self._images(params, z, _int32(labels))

  def densities(self, params: PyTree, noisy: Values, labels: Labels) -> dict[str, PerImage]:
    """Returns `LogDensity.nll_terms`, given the class, of samples before denoising."""
    return self._densities(params, noisy, _int32(labels))

  def lower(self, params: PyTree, labels: jax.ShapeDtypeStruct) -> dict[str, jax.stages.Lowered]:
    """Traces the programs `prior` and `inverse` for ahead-of-time compilation."""
    arguments = params, labels, labels, np.zeros(2, np.float32), np.float32(1)
    z, _ = jax.eval_shape(self._latents_and_sizes, *arguments)
    z = jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=labels.sharding)
    return {
      'prior': self._latents_and_sizes.lower(*arguments),
      'inverse': self._images.lower(params, z, labels),
    }

  def _arguments(
    self,
    labels: Labels,
    indices: Labels,
    scales: tuple[float, float] | None = None,
    variance: float | None = None,
  ) -> tuple[Any, ...]:
    """Returns the arguments of `_draw` after the parameters."""
    sampling = self._config.sampling
    scales = sampling.guidance.scales if scales is None else scales
    variance = sampling.redundant_variance if variance is None else variance
    return _int32(labels), _int32(indices), np.asarray(scales, np.float32), np.float32(variance)

  def _draw(
    self, params: PyTree, labels: Ints, indices: Ints, *factors: Array
  ) -> tuple[Tokens, guidance_lib.EffectiveSizes]:
    named_key = functools.partial(random.named_key, self._config.sampling.seed, 'sample')
    keys = jax.vmap(named_key)(indices)
    params = layers.cast_params(params, self._model.config.dtype)
    z, sizes = draw_latents(params, labels, keys, *factors, model=self._model, config=self._config)
    return layers.shard_batch(z), sizes

  def _decode(self, params: PyTree, z: Tokens, labels: Ints) -> Samples:
    sampling, noise_config = self._config.sampling, self._config.noise
    params = layers.cast_params(params, self._model.config.dtype)
    apply: Callable[..., Any] = functools.partial(self._model.apply, {'params': params})
    if sampling.inverse == 'student':
      options = dict(method='decode_with_student', refinement_rounds=sampling.refinement_rounds)
    else:
      options = dict(method='decode', chunk_sizes=self._chunk_sizes)
    noisy, convergence = apply(z, labels, tolerance=sampling.tolerance, **options)
    values = noisy
    if sampling.denoise and not self._config.student_denoises:
      # Tweedie's formula: the expected noise-free image given the noisy image.
      score = jax.grad(lambda x: apply(x, labels).total.sum())
      values = noisy + noise_config.std_end**2 * score(noisy)
    finite_values = jnp.nan_to_num(values, posinf=0, neginf=0)
    return Samples(
      values=values,
      noisy=noisy,
      images=noise.build(noise_config).quantize(finite_values),
      finite=jnp.isfinite(values).all((1, 2, 3)),
      residual=convergence.residual.max(0, initial=0),
      passes=convergence.passes,
    )

  def _nll_terms(self, params: PyTree, noisy: Values, labels: Ints) -> dict[str, PerImage]:
    params = layers.cast_params(params, self._model.config.dtype)
    density: Any = self._model.apply({'params': params}, noisy, labels)
    return density.nll_terms(noisy[0].size)


def _int32(values: Labels) -> Ints | np.ndarray:
  """Converts lists and NumPy arrays to int32. JAX arrays stay on their devices."""
  return values if isinstance(values, jax.Array) else np.asarray(values, np.int32)
