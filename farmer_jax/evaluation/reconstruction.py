"""Evaluates how accurately a student reconstructs held-out images from their latents."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from farmer_jax import config as config_lib
from farmer_jax import losses
from farmer_jax import noise as noise_lib
from farmer_jax.nn import student
from farmer_jax.ops import dequantize

Params = dict[str, Any]


class ReconstructionEvaluator:
  """Computes the errors of a student on a split, without noise on the student's input.

  The parameters of the teacher are constant. The images have the noise of the teacher's evaluation.
  """

  def __init__(
    self, model: student.StudentFarmer, config: config_lib.Config, teacher: Params
  ) -> None:
    self._model, self._config, self._teacher = model, config, teacher
    self._sums = jax.jit(self._masked_sums)

  def __call__(self, params: Params, batches: Iterable[dict[str, Array]]) -> dict[str, float]:
    """Evaluates the student on batches of `data.pipeline.evaluation_batches`.

    Returns:
      `loss_block_t`: the mean squared error of each flow block, see `losses.student_errors`.
      `loss`: the mean over the blocks. `rmse`: the root mean squared error of images in [-1, 1].
      `psnr`: this error in dB.
    """
    sums, count = [], 0
    for batch in batches:
      errors, images = jax.device_get(self._sums(params, self._teacher, batch))
      sums.append(np.asarray(errors, np.float64))
      count += int(images)
    errors = np.sum(sums, axis=0) / count
    rmse = math.sqrt(errors[0])
    blocks = {f'loss_block_{t}': float(error) for t, error in enumerate(errors)}
    return {'loss': float(errors.mean()), **blocks, 'rmse': rmse, 'psnr': dequantize.psnr(rmse)}

  def _masked_sums(
    self, params: Params, teacher: Params, batch: dict[str, Array]
  ) -> tuple[Float[Array, 'T'], Int[Array, '']]:
    """Returns the summed errors of each block, without padding, and the number of images."""
    config, labels = self._config, batch['label']
    noise = noise_lib.build(config.noise)
    images = noise_lib.evaluation_images(noise, batch['image'], batch['index'], config.seed)
    settings: dict[str, Any] = dict(model=self._model, objective=config.distill.objective)
    errors = losses.student_errors(params, teacher, images, labels, 0.0, **settings)
    mask = batch['mask'].astype(bool)
    return jnp.where(mask, errors, 0).sum(1), mask.sum()
