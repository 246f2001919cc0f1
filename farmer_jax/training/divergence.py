"""Training that goes astray: when to go back, when to give up, and what to say about it."""

import json
import statistics

import jax
import numpy as np

from farmer_jax import terminal
from farmer_jax.errors import ConfigError
from farmer_jax.workdir import layout

# A log-det is out of the ordinary that is so many times the usual deviation away from the median of
# the last so many values, and by at least so many nats/dim.
_DEVIATIONS, _REMEMBERED, _LEAST = 20, 50, 0.5
_LOG_DET = 'log_det_block_'


class Watch:
  """Counts updates left out in a row, and returns to checkpoints because of them.

  Args:
    settings: `config.Train`.
    workdir: the run's `epath.Path`.
    diagnose: diagnose(params, batch, step) -> (a sentence without its full stop, a dict that can be
      written as JSON), or None.
  """

  def __init__(self, settings, workdir, diagnose=None):
    self._settings = settings
    self._workdir = workdir
    self._diagnose = diagnose
    self._previous = None  # of the step before, whose computation is over
    self._returns = 0
    self._log_dets: dict[str, list[float]] = {}

  def must_go_back(self, values):
    """Whether too many updates in a row were left out, up to the step before the one that has these
    metrics: waiting for this one would leave the devices idle."""
    previous, self._previous = self._previous, values['skipped_in_a_row']
    return previous is not None and int(previous) >= self._settings.max_skipped

  def report(self, step, params, batch):
    """Says what is amiss before the run goes back, and writes it to WORKDIR/divergence/<step>.json.

    Raises:
      ConfigError: the run has gone back too often.
    """
    self._returns += 1
    self._previous = None
    found, details = '', {}
    if self._diagnose:
      found, details = self._diagnose(params, batch, step)
    count, most = self._settings.max_skipped, self._settings.max_returns
    what = f'step {step}: {count} updates in a row were unusable' + (f' ({found})' if found else '')
    if not jax.process_index():
      folder = self._workdir / 'divergence'
      folder.mkdir(parents=True, exist_ok=True)
      record = {'step': step, 'found': found, 'returns': self._returns, **details}
      layout.write_atomically(folder / f'{step}.json', json.dumps(record, indent=2) + '\n')
    if self._returns > most:
      raise ConfigError(
        f'training diverges: {what}, after going back {most} times; train into another --workdir,'
        ' with a smaller config.train.optimizer.learning_rate or a larger'
        ' config.train.optimizer.warmup_steps'
      )
    terminal.say(f'{what}. Going back, {self._returns} of at most {most} times.')

  def look_at(self, step, values):
    """Says which flow blocks have log-dets out of the ordinary: images then come out blurred."""
    strange = []
    for name, value in values.items():
      if not name.startswith(_LOG_DET):
        continue
      value, known = float(value), self._log_dets.setdefault(name, [])
      if len(known) == _REMEMBERED:
        middle = statistics.median(known)
        usual = statistics.median(abs(v - middle) for v in known)
        if not abs(value - middle) <= max(_LEAST, _DEVIATIONS * usual):
          strange.append(f'{name.removeprefix(_LOG_DET)} ({value:.3g}, before {middle:.3g})')
          known.clear()  # Said once, and what comes is compared with what comes.
        else:
          known.pop(0)
      if np.isfinite(value):
        known.append(value)
    if strange:
      terminal.say(
        f'step {step}: log-dets out of the ordinary, nats/dim, in flow blocks {", ".join(strange)}'
      )


def summary(extremes):
  """What `objectives.nll_extremes` found, on the host.

  Returns:
    The most telling parts as a sentence without its full stop; and everything as a dict that can be
    written as JSON, numbers that are not finite as words.
  """
  terms = {name: a for name, a in extremes.items() if a.ndim == 1 and not _is_range(name)}
  blocks, words = extremes['log_det_blocks'], []
  for name, values in terms.items():
    bad = int((~np.isfinite(values)).sum())
    if bad and name != 'loss':
      words.append(f'{name} is not finite in {bad} of {len(values)} images')
  if len(blocks):
    means = blocks.mean(1)
    worst = int(np.argmax(np.where(np.isfinite(means), abs(means), np.inf)))
    words.append(f'largest log-det in flow block {worst}, {means[worst]:.3g} nats/dim')
  if 'flow_log_scale' in extremes:
    lowest, highest = extremes['flow_log_scale'].T
    low, high = np.argmin(_finite(lowest, -np.inf)), np.argmax(_finite(highest, np.inf))
    words.append(
      f'log σ from {lowest[low]:.3g} (block {low}) to {highest[high]:.3g} (block {high})'
    )
  for name in ('informative', 'redundant'):
    if f'{name}_log_scale' in extremes:
      low, high = np.exp(extremes[f'{name}_log_scale'].astype(np.float64))
      words.append(f'{name} mixture scales from {low:.3g} to {high:.3g}')
  details = {name: [_number(a.min()), _number(a.max())] for name, a in terms.items()}
  details['log_det_blocks'] = [_number(value) for value in blocks.mean(1)]
  details |= {name: _numbers(a) for name, a in extremes.items() if _is_range(name)}
  return '; '.join(words), details


def _is_range(name):
  return name.endswith('_log_scale')


def _finite(values, otherwise):
  return np.where(np.isfinite(values), values, otherwise)


def _numbers(values):
  return [_numbers(row) for row in values] if np.ndim(values) else _number(values)


def _number(value):
  """JSON knows no infinities."""
  return float(value) if np.isfinite(value) else str(value)
