"""Drawing images from a trained model."""

import functools

import jax
import numpy as np

from farmer_jax.ops import dequantize, random


class Sampler:
  """Draws images with the exact sequential inverse; the whole draw is one compiled program."""

  def __init__(self, model, config):
    self._seed = config.sampling.seed
    self._draw = jax.jit(functools.partial(_draw, model=model, noise_kind=config.noise.kind))

  def __call__(self, params, labels):  # int [n]
    """Images for `labels`: uint8 [n, H, W, C], and whether each came out finite, bool [n]."""
    key = random.named_key(self._seed, 'sample')
    images, finite = self._draw(params, key, np.asarray(labels, np.int32))
    return np.asarray(images), np.asarray(finite)


def _draw(params, key, labels, *, model, noise_kind):
  images = model.apply({'params': params}, key, labels, method='sample')
  finite = jax.numpy.isfinite(images).all((1, 2, 3))
  return dequantize.quantize(jax.numpy.nan_to_num(images), noise_kind), finite


def grid_labels(config):
  """Labels of a sample grid: a row a class, or rows of unconditional samples; [rows, columns]."""
  rows, columns = config.sampling.max_classes, config.sampling.per_class
  classes = config.data.num_classes
  if not classes:
    return np.zeros((rows, columns), np.int32)
  return np.repeat(np.arange(min(classes, rows), dtype=np.int32)[:, None], columns, axis=1)
