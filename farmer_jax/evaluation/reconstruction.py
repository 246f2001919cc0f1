"""How well a student reconstructs held-out images from their latents."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from farmer_jax import losses
from farmer_jax.ops import dequantize


class ReconstructionEvaluator:
  """Errors of a student on a split, without noise on its input.

  Images are as the teacher is evaluated on them: `losses.evaluation_images`.
  """

  def __init__(self, model, config, teacher):
    self._teacher = teacher
    self._sums = jax.jit(functools.partial(_masked_sums, model=model, config=config))

  def __call__(self, params, batches):
    """Evaluates `params` on (image, label, index, mask) batches; returns a dict of floats.

    `loss` is what training minimises, the mean over blocks of `loss_block_t`; `rmse` is the root
    mean square error of the images, in [-1, 1], and `psnr` the same in dB.
    """
    sums, count = [], 0
    for batch in batches:
      found = jax.device_get(self._sums(params, self._teacher, batch))
      sums.append(np.asarray(found[0], np.float64))
      count += int(found[1])
    errors = np.sum(sums, axis=0) / count
    rmse = math.sqrt(errors[0])
    return {
      'loss': float(errors.mean()),
      **{f'loss_block_{t}': float(error) for t, error in enumerate(errors)},
      'rmse': rmse,
      'psnr': dequantize.psnr(rmse),
    }


def _masked_sums(params, teacher, batch, *, model, config):
  """Sums over the real examples of a batch of the errors of each block, [T], and their count."""
  images = losses.evaluation_images(batch['image'], batch['index'], config.noise, config.seed)
  errors = losses.student_errors(
    params,
    teacher,
    images,
    batch['label'],
    0.0,
    model=model,
    objective=config.distill.objective,
  )
  mask = batch['mask'].astype(bool)
  return jnp.where(mask, errors, 0).sum(1), mask.sum()
