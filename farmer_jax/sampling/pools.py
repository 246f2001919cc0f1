"""Reports how many candidates of guidance by resampling have an effect. See `guidance.resample`."""

from typing import Any

import numpy as np
from absl import logging
from jaxtyping import PyTree

from farmer_jax.config import Guidance, Sampling
from farmer_jax.distributed import mesh
from farmer_jax.ops.guidance import EffectiveSizes
from farmer_jax.sampling.sampler import Sampler

# With a smaller mean effective size, in candidates, guidance hardly chooses.
_FEW_CANDIDATES = 2.0

_CANDIDATES = {
  'informative': ('conditional_candidates', 'unconditional_candidates'),
  'redundant': ('redundant_candidates', 'redundant_candidates'),
}


def measure_pools(
  sampler: Sampler,
  params: PyTree,
  labels: list[int],
  sampling: Sampling,
  devices: mesh.LocalDevices,
) -> dict[str, Any] | None:
  """Measures the pools of the first batch of samples on the active `devices`, and logs the result.

  Returns:
    A JSON-serializable dict, or None without guidance by resampling. `informative` and `redundant`
    have `candidates`, the size of the pool, and statistics of its effective sample size, divided by
    this size: `mean`, `quantile_5` (5 %) and, for informative channels, `by_token`, the means over
    the images in the token order of the prior.
  """
  if not sampling.guidance.resamples:
    return None
  indices = np.arange(devices.round_up(sampling.batch_size), dtype=np.int32)
  batch = devices.shard((np.asarray(labels, np.int32)[indices % len(labels)], indices))
  sizes = sampler.effective_sizes(params, *batch)
  report = summarize_pools(sizes, sampling.guidance)
  _log(report)
  return {'images': len(indices), **report}


def summarize_pools(sizes: EffectiveSizes, guidance: Guidance) -> dict[str, dict[str, Any]]:
  """Returns the statistics of each pool, see `measure_pools`. A value is None if it is unknown."""
  report: dict[str, dict[str, Any]] = {}
  for pool, keys in _CANDIDATES.items():
    if (fractions := getattr(sizes, pool)) is not None:
      values = np.asarray(fractions, np.float64)
      report[pool] = {
        'candidates': sum(getattr(guidance, key) for key in keys),
        'mean': _finite(values.mean()),
        'quantile_5': _finite(np.quantile(values, 0.05)),
      }
      if values.ndim > 1:
        report[pool]['by_token'] = [_finite(mean) for mean in values.mean(0)]
  return report


def _finite(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


def _log(report: dict[str, dict[str, Any]]) -> None:
  known = {name: pool for name, pool in report.items() if pool['mean'] is not None}
  parts = [
    f'{pool["mean"] * pool["candidates"]:.1f} of {pool["candidates"]} candidates ({name} channels)'
    for name, pool in known.items()
  ]
  logging.info(f'Mean effective size of the pools of guidance: {", ".join(parts) or "unknown"}')
  for name, pool in known.items():
    if pool['mean'] * pool['candidates'] < _FEW_CANDIDATES:
      keys = dict.fromkeys(f'--config.sampling.guidance.{key}' for key in _CANDIDATES[name])
      logging.warning(
        f'Guidance of the {name} channels chooses among fewer than {_FEW_CANDIDATES:g} effective'
        f' candidates. Use a smaller --config.sampling.guidance.scale or .sharpening, a larger'
        f' .weighing_scale_factor, or a larger {" and ".join(keys)}.'
      )
