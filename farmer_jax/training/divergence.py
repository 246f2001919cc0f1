"""Detects training that diverges, and describes what went wrong."""

import collections
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from farmer_jax import config
from farmer_jax.errors import DivergenceError
from farmer_jax.workdir import layout

# A log-determinant is unusual if it differs from the median of the last 50 values by more than 20
# median absolute deviations and by more than 0.5 nats/dim.
_DEVIATIONS, _WINDOW, _MINIMUM = 20, 50, 0.5
_LOG_DET = 'log_det_block_'

Diagnose = Callable[[Any, Any, int], tuple[str, dict[str, Any]]]


class DivergenceMonitor:
  """Watches skipped updates and log-determinants.

  diagnose(params, batch, step) describes the batch of the step at which divergence was detected. It
  returns a sentence without a full stop and a dict for JSON.
  """

  def __init__(self, train: config.Train, workdir: epath.Path, diagnose: Diagnose | None = None):
    self._train, self._workdir, self._diagnose = train, workdir, diagnose
    self._previous: jax.Array | None = None  # consecutive skips after the previous step
    self._rollbacks = 0
    self._log_dets: dict[str, collections.deque[float]] = {}

  def has_diverged(self, metrics: dict[str, jax.Array]) -> bool:
    """Returns whether too many consecutive updates were skipped.

    Checks the metrics of the previous call. Waiting for `metrics` would leave the devices idle.
    """
    previous, self._previous = self._previous, metrics['consecutive_skips']
    return previous is not None and int(previous) >= self._train.max_consecutive_skips

  def report(self, step: int, params: Any, batch: Any) -> None:
    """Logs why a run diverged and writes WORKDIR/divergence/<step>.json.

    Raises:
      DivergenceError: the allowed number of rollbacks is used up.
    """
    self._rollbacks += 1
    self._previous = None
    finding, details = self._diagnose(params, batch, step) if self._diagnose else ('', {})
    limit = self._train.max_rollbacks
    what = f'step {step}: {self._train.max_consecutive_skips} consecutive updates were unusable'
    what += f' ({finding})' if finding else ''
    if not jax.process_index():
      folder = self._workdir / 'divergence'
      record = {'step': step, 'finding': finding, 'rollbacks': self._rollbacks, **details}
      layout.write_json(folder / f'{step}.json', record)
    if self._rollbacks > limit:
      raise DivergenceError(
        f'training diverges: {what}, after {limit} rollbacks; start a new run in another --workdir,'
        ' with a smaller config.train.optimizer.learning_rate or a larger'
        ' config.train.optimizer.warmup_steps'
      )
    logging.warning(f'{what}. Starting rollback {self._rollbacks} of at most {limit}.')

  def check_log_dets(self, step: int, metrics: dict[str, float]) -> None:
    """Warns about flow blocks with unusual log-determinants, an early sign of blurred samples."""
    unusual = []
    for name, value in metrics.items():
      if not name.startswith(_LOG_DET):
        continue
      value = float(value)
      history = self._log_dets.setdefault(name, collections.deque(maxlen=_WINDOW))
      if len(history) == _WINDOW:
        median = statistics.median(history)
        deviation = statistics.median(abs(v - median) for v in history)
        if not abs(value - median) <= max(_MINIMUM, _DEVIATIONS * deviation):
          unusual.append(f'{name.removeprefix(_LOG_DET)} ({value:.3g}, median {median:.3g})')
          history.clear()  # Each change of level causes one warning.
      if np.isfinite(value):
        history.append(value)
    if unusual:
      logging.warning(
        f'step {step}: unusual log-determinants (nats/dim) in flow blocks {", ".join(unusual)}'
      )


def summarize(diagnostics: dict[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
  """Summarizes `losses.nll_diagnostics`, given as NumPy arrays.

  Returns a sentence without a full stop with the most important findings, and a dict for JSON with
  all findings. In the dict, numbers that are not finite are strings.
  """
  terms = {n: a for n, a in diagnostics.items() if a.ndim == 1 and not _is_range(n)}
  block_means = diagnostics['log_det_blocks'].mean(1)
  words = []
  for name, values in terms.items():
    bad = int((~np.isfinite(values)).sum())
    if bad and name != 'loss':
      words.append(f'{name} is not finite in {bad} of {len(values)} images')
  if len(block_means):
    worst = int(np.argmax(np.where(np.isfinite(block_means), abs(block_means), np.inf)))
    words.append(
      f'largest log-determinant in flow block {worst}, {block_means[worst]:.3g} nats/dim'
    )
  if 'flow_log_scale' in diagnostics:
    lowest, highest = diagnostics['flow_log_scale'].T
    low = np.argmin(np.where(np.isfinite(lowest), lowest, -np.inf))
    high = np.argmax(np.where(np.isfinite(highest), highest, np.inf))
    words.append(
      f'log σ from {lowest[low]:.3g} (block {low}) to {highest[high]:.3g} (block {high})'
    )
  for name in ('informative', 'redundant'):
    if f'{name}_log_scale' in diagnostics:
      low, high = np.exp(diagnostics[f'{name}_log_scale'].astype(np.float64))
      words.append(f'{name} mixture scales from {low:.3g} to {high:.3g}')
  details: dict[str, Any] = {n: _for_json([a.min(), a.max()]) for n, a in terms.items()}
  details['log_det_blocks'] = _for_json(block_means)
  details |= {n: _for_json(a) for n, a in diagnostics.items() if _is_range(n)}
  return '; '.join(words), details


def _is_range(name: str) -> bool:
  return name.endswith('_log_scale')


def _for_json(values: Any) -> Any:
  """Converts arrays to nested lists. Numbers that are not finite become strings."""
  if np.ndim(values):
    return [_for_json(value) for value in values]
  return float(values) if np.isfinite(values) else str(values)
