"""Means over the images of a split, for validation during training."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from farmer_jax import config as config_lib
from farmer_jax import losses
from farmer_jax import noise as noise_lib
from farmer_jax.evaluation import likelihood
from farmer_jax.ops import units

Params = dict[str, Any]
Batch = dict[str, Array]  # of `data.pipeline.evaluation_batches`


@dataclasses.dataclass
class _Evaluator:
  """Subclasses define `_score`, the values of each image, and `_report`, metrics of their means."""

  model: Any
  config: config_lib.Config
  teacher: Params | None = None

  def __post_init__(self) -> None:
    self._noise, self._sums = noise_lib.build(self.config.noise), jax.jit(self._masked_sums)

  def __call__(self, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
    """Evaluates parameters on a split."""
    totals: dict[str, Any] = {}
    for batch in batches:
      sums = jax.device_get(self._sums(params, self.teacher, batch))
      totals = {n: totals.get(n, 0) + np.asarray(value, np.float64) for n, value in sums.items()}
    count = totals.pop('count')
    return self._report({name: (total / count).tolist() for name, total in totals.items()})

  def _masked_sums(self, params: Params, teacher: Params | None, batch: Batch) -> dict[str, Array]:
    """Returns sums over the images of a batch, without padding, and their `count`."""
    mask, scores = batch['mask'].astype(bool), self._score(params, teacher, batch)
    # If padding is nan, a sum of products with the mask is nan.
    sums = {name: jnp.where(mask, values, 0).sum(-1) for name, values in scores.items()}
    return sums | {'count': mask.sum()}

  def _score(self, params: Params, teacher: Any, batch: Batch) -> dict[str, Float[Array, '... B']]:
    raise NotImplementedError

  def _report(self, means: dict[str, Any]) -> dict[str, float]:
    raise NotImplementedError


class LikelihoodEvaluator(_Evaluator):
  """Computes the mean negative log-likelihood of a split, given the label of each image.

  Each image has one noise draw. The results are `loss`, `nll_informative`, `nll_redundant` and
  `log_det` in nats/dim. With uniform dequantization also `bits_per_dim`. With Gaussian noise also
  `noise_std`, the standard deviation at which the density is evaluated.
  """

  def _score(self, params: Params, teacher: Any, batch: Batch) -> dict[str, Float[Array, 'B']]:
    scorer = likelihood.Scorer(self.model, self.config, seed=self.config.seed)
    scores = scorer(params, batch['image'], batch['label'], batch['index'])
    return {n: scores[n] for n in ('loss', 'nll_informative', 'nll_redundant', 'log_det')}

  def _report(self, means: dict[str, Any]) -> dict[str, float]:
    if self._noise.has_bits_per_dim:
      return means | {'bits_per_dim': units.bits_per_dim(means['loss'])}
    return means | {'noise_std': self._noise.noise.std_end}


class ReconstructionEvaluator(_Evaluator):
  """Computes the errors of a student on a split, without noise on the student's input.

  The images have the noise of the teacher's evaluation. The results are `loss_block_t`, the error
  of each flow block (see `losses.student_errors`); `loss`, the mean over the blocks; `rmse`, the
  root mean squared error of images in [-1, 1]; and `psnr`, this error in dB. A student that removes
  the noise also has `rmse_noise_free` and `psnr_noise_free`, compared with images without noise.
  """

  def _score(self, params: Params, teacher: Any, batch: Batch) -> dict[str, Float[Array, '... B']]:
    levels, seed = batch['image'], self.config.seed
    images = noise_lib.evaluation_images(self._noise, levels, batch['index'], seed)
    noise_free = noise_lib.scaled(levels) if self.config.distill.denoise else None
    errors, found = losses.student_errors(
      params, teacher, images, batch['label'], 0.0, noise_free, model=self.model
    )
    if noise_free is None:
      return {'errors': errors}
    return {'errors': errors, 'noisy': ((found - images) ** 2).mean((1, 2, 3))}

  def _report(self, means: dict[str, Any]) -> dict[str, float]:
    errors = means['errors']
    blocks = {f'loss_block_{t}': error for t, error in enumerate(errors)}
    images = {'': means['noisy'], '_noise_free': errors[0]} if 'noisy' in means else {'': errors[0]}
    rmse = {name: math.sqrt(error) for name, error in images.items()}
    psnr = {f'psnr{name}': units.psnr(error) for name, error in rmse.items()}
    rmse = {f'rmse{name}': error for name, error in rmse.items()}
    return {'loss': float(np.mean(errors)), **blocks, **rmse, **psnr}
