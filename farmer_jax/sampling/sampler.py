"""Drawing images from a trained model: tokens from the prior, guided or not, then the inverse of
the flow."""

import dataclasses
import functools
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from farmer_jax.ops import dequantize, guidance, random


@flax.struct.dataclass
class Samples:
  """Images and what is to be said about them."""

  values: jax.Array  # [n, H, W, C], on the scale of the training data
  images: jax.Array  # uint8 [n, H, W, C]; grey where values are not finite
  finite: jax.Array  # bool [n], whether all values are
  residual: jax.Array  # [n], the largest `flow.Convergence.residual` of the blocks
  passes: jax.Array  # [T, n], `flow.Convergence.passes`


class Draws:
  """How the prior's tokens are drawn. Each image has a key of its own: what it gets does not depend
  on its neighbours in the batch."""

  def __init__(self, keys, scales, variance, settings):
    """Keys [B], guidance scales of the tokens [N], variance factor of the redundant channels, and
    `config.Guidance`."""
    self._token_keys, self._redundant_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    self._scales, self._variance, self._settings = scales, variance, settings

  def token(self, mixtures, i):  # [S, B, ...]
    """Token i of the informative channels, [B, d_I]."""

    def draw(key, mixtures):
      key = jax.random.fold_in(key, i)
      return guidance.draw_token(key, mixtures, self._scales[i], self._settings)

    return jax.vmap(draw, (0, 1))(self._token_keys, mixtures)

  def shared(self, mixtures, tokens):  # [S, B, ...]
    """The redundant channels of all tokens, [B, N, d_R]; the last token's scale guides them."""

    def draw(key, mixtures):
      return guidance.draw_shared(
        key, mixtures, self._scales[-1], self._settings, tokens, self._variance
      )

    return jax.vmap(draw, (0, 1))(self._redundant_keys, mixtures)

  def normal(self, tokens, channels):
    """Standard normals, [B, N, d], times the root of the variance factor."""
    draw = functools.partial(jax.random.normal, shape=(tokens, channels))
    return jnp.sqrt(self._variance) * jax.vmap(draw)(self._redundant_keys)


def in_sampling_dtype(model, settings):
  """`model` with its transformers in the dtype that `config.Sampling` asks for.

  By default float32 in place of bfloat16: the inverse of the flow meets other shapes than the
  forward pass does, and rounds otherwise, which deep flows amplify.
  """
  dtype = settings.dtype or ('float32' if model.settings.dtype == 'bfloat16' else None)
  if dtype is None:
    return model
  return model.clone(settings=dataclasses.replace(model.settings, dtype=dtype))


class Sampler:
  """Draws images; image number i is a function of the seed, i and its label.

  Args:
    model: a `farmer.Farmer`.
    config: `config.Config`.
    chunks: for each flow block how many tokens its inverse finds together (see
      `flow.FlowBlock.inverse`); None inverts token by token, which is exact.
    out_shardings: where results live, as `jax.jit` takes it.
  """

  def __init__(self, model, config, chunks=None, out_shardings=None):
    self._settings = config.sampling
    model = in_sampling_dtype(model, config.sampling)
    chunks = None if chunks is None else tuple(chunks)
    both: dict[str, Any] = dict(model=model, config=config)
    jit = functools.partial(jax.jit, out_shardings=out_shardings)
    self._latents = jit(functools.partial(_draw_numbered, **both))
    self._images = jit(functools.partial(_to_images, chunks=chunks, **both))

  def __call__(self, params, labels, numbers):  # int [n], int [n]
    """Draws the images `numbers` of the classes `labels`; returns `Samples`."""
    return self.images(params, self.latents(params, labels, numbers), labels)

  def latents(self, params, labels, numbers, scales=None, variance=None):
    """Draws z [n, N, d] from the prior.

    Args:
      params: the model's parameters.
      labels: int [n].
      numbers: int [n].
      scales: guidance scales at the first and at the last token, in place of the configured ones;
        without effect unless those guide.
      variance: factor on the variance of the redundant channels, in place of the configured one.
    """
    scales = guidance_scales(self._settings.guidance) if scales is None else scales
    variance = self._settings.redundant_variance if variance is None else variance
    return self._latents(
      params,
      _int32(labels),
      _int32(numbers),
      np.asarray(scales, np.float32),
      np.float32(variance),
    )

  def lower(self, params, labels):
    """Traces both halves, ready to be compiled: {'prior': …, 'inverse': …}. Arguments may be what
    describes arrays that are not there; labels int32 [n]."""
    scales, variance = np.zeros(2, np.float32), np.float32(1)
    arguments = params, labels, labels, scales, variance
    z = jax.eval_shape(self._latents, *arguments)
    z = jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=labels.sharding)
    return {
      'prior': self._latents.lower(*arguments),
      'inverse': self._images.lower(params, z, labels),
    }

  def images(self, params, z, labels):  # [n, N, d], int [n]
    """The `Samples` whose latents are z."""
    return self._images(params, z, _int32(labels))


def _int32(values):
  """Lists and NumPy arrays as int32; arrays on devices stay where they are."""
  return values if isinstance(values, jax.Array) else np.asarray(values, np.int32)


def guidance_scales(settings):
  """Guidance scales w at the first and at the last token, of `config.Guidance`; (0, 0): none."""
  if settings.method == 'none':
    return 0.0, 0.0
  return settings.scale, settings.scale if settings.final_scale is None else settings.final_scale


def grid_labels(config):
  """Labels of a sample grid: a row a class, or rows of unconditional samples; [rows, columns]."""
  rows, columns = config.sampling.max_classes, config.sampling.per_class
  classes = config.data.num_classes
  if not classes:
    return np.zeros((rows, columns), np.int32)
  return np.repeat(np.arange(min(classes, rows), dtype=np.int32)[:, None], columns, axis=1)


def plan_inverse(model, config, params, z, labels):
  """Chooses how the inverse of each flow block runs, by trying on a batch of latents.

  Chunks of one token are the exact sequential inverse. Everything else is held against that, and,
  where `config.sampling.inverse` is auto, chosen where it is faster and ends within the tolerance.

  Returns:
    A dict for JSON: `chunks`, the tokens found together, by block; `trials`, by block and chunk:
    milliseconds an image, passes over the tokens (the largest of the batch), and `error`, the
    largest difference to the sequential inverse relative to 1 + |x|; `difference`, the same of the
    whole chain.
  """
  settings, blocks = config.sampling, config.model.flow.blocks
  candidates = _chunk_candidates(settings, model.tokens)
  undo = jax.jit(
    functools.partial(model.apply, method='decode_block'), static_argnames=('chunk', 'tolerance')
  )
  exact = planned = model.last_stage(z)
  chunks: list[int] = []
  trials: list[dict] = []
  for block in reversed(range(blocks)):

    def run(z, chunk, block=block):
      start = time.perf_counter()
      result = jax.block_until_ready(
        undo({'params': params}, z, labels, block, chunk=chunk, tolerance=settings.tolerance)
      )
      return result, (time.perf_counter() - start) * 1e3 / len(z)

    found = {chunk: run(exact, chunk)[0] for chunk in candidates}  # also compiles
    seconds = [{chunk: run(exact, chunk)[1] for chunk in candidates} for _ in range(3)]
    reference = found[1][0]
    trial = {
      chunk: {
        'ms_per_image': min(times[chunk] for times in seconds),
        'passes': float(report.passes.max()),
        'error': _relative_difference(x, reference),
      }
      for chunk, (x, report) in found.items()
    }
    chunk = candidates[-1]
    if settings.inverse == 'auto':
      exact_enough = [c for c in candidates if trial[c]['error'] <= settings.tolerance]
      chunk = min(exact_enough, key=lambda c: trial[c]['ms_per_image'])
    chunks.insert(0, chunk)
    trials.insert(0, trial)
    exact, planned = reference, run(planned, chunk)[0][0]
  return {
    'chunks': chunks,
    'trials': trials,
    'difference': _relative_difference(planned, exact),
  }


def compare_student(model, config, params, z, labels):
  """Holds the student's inverse of a batch of latents against the sequential one.

  Returns:
    A dict for JSON: `rmse`, the root mean square difference of pixel values, and `psnr`, dB, whose
    peak is the range of 2; `difference`, the largest relative to 1 + |x|; milliseconds an image of
    both; and `speedup`.
  """
  samplers = {}
  for inverse in ('sequential', 'student'):
    settings = dataclasses.replace(config.sampling, inverse=inverse, denoise=False)
    samplers[inverse] = Sampler(model, dataclasses.replace(config, sampling=settings))
  values: dict[str, jax.Array] = {}
  times: dict[str, list[float]] = {inverse: [] for inverse in samplers}
  for _ in range(4):  # the first time also compiles
    for inverse, sampler in samplers.items():
      start = time.perf_counter()
      values[inverse] = jax.block_until_ready(sampler.images(params, z, labels).values)
      times[inverse].append((time.perf_counter() - start) * 1e3 / len(z))
  exact, guessed = values['sequential'], values['student']
  rmse = float(jnp.sqrt(jnp.nanmean((guessed - exact) ** 2)))
  milliseconds = {inverse: min(series[1:]) for inverse, series in times.items()}
  return {
    'rmse': rmse,
    'psnr': dequantize.psnr(rmse),
    'difference': _relative_difference(guessed, exact),
    'ms_per_image': milliseconds['student'],
    'sequential_ms_per_image': milliseconds['sequential'],
    'speedup': milliseconds['sequential'] / milliseconds['student'],
  }


def _chunk_candidates(settings, tokens):
  """Tokens found together: 1 is tried always."""
  unknown = tokens - 1
  if settings.inverse == 'auto':
    between = (4**power for power in range(1, unknown.bit_length()))
    return (1, *(chunk for chunk in between if chunk < unknown), unknown)
  return (1, *{'parallel': (unknown,), 'chunked': (settings.chunk,)}.get(settings.inverse, ()))


def _relative_difference(x, reference):
  """Largest difference of finite values, relative to 1 + |x|."""
  difference = abs(x - reference) / (1 + abs(reference))
  return float(jnp.where(jnp.isfinite(reference), difference, 0).max(initial=0))


def _draw_numbered(params, labels, numbers, scales, variance, *, model, config):
  named = functools.partial(random.named_key, config.sampling.seed, 'sample')
  return draw_latents(
    params, labels, jax.vmap(named)(numbers), scales, variance, model=model, config=config
  )


def draw_latents(params, labels, keys, scales, variance, *, model, config):
  """Draws z [n, N, d] from the prior as `config.sampling` says: arguments as for
  `Sampler.latents`, which compiles this, but keys [n] in place of numbers."""
  settings = config.sampling
  streams = [labels]
  if any(guidance_scales(settings.guidance)):
    streams.append(jnp.full_like(labels, config.data.num_classes))
  draws = Draws(keys, jnp.linspace(scales[0], scales[1], model.tokens), variance, settings.guidance)
  return model.apply({'params': params}, jnp.stack(streams), draws, method='sample_latents')


def draw_values(params, labels, keys, *, model, config):
  """Draws images [n, H, W, C] on the scale of the training data, by the exact inverse: arguments
  as for `draw_latents`."""
  settings = config.sampling
  scales = jnp.asarray(guidance_scales(settings.guidance))
  z = draw_latents(
    params, labels, keys, scales, settings.redundant_variance, model=model, config=config
  )
  return model.apply({'params': params}, z, labels, method='decode')[0]


def _to_images(params, z, labels, *, model, config, chunks):
  settings, variables = config.sampling, {'params': params}
  method, how = 'decode', {'chunks': chunks}
  if settings.inverse == 'student':
    method, how = 'decode_by_student', {'rounds': settings.refinement_rounds}
  values, report = model.apply(
    variables, z, labels, tolerance=settings.tolerance, method=method, **how
  )
  if settings.denoise:
    # The best guess of what noise of this size was added to (Tweedie's formula).
    score = jax.grad(lambda x: model.apply(variables, x, labels).total.sum())
    values += config.noise.std_end**2 * score(values)
  return Samples(
    values=values,
    images=dequantize.quantize(jnp.nan_to_num(values, posinf=0, neginf=0), config.noise.kind),
    finite=jnp.isfinite(values).all((1, 2, 3)),
    residual=report.residual.max(0, initial=0),
    passes=report.passes,
  )
