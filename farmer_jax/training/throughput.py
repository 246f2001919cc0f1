"""Speed and progress of a training run."""

import contextlib
import time
from collections.abc import Iterator

import jax
from jaxtyping import Array

from farmer_jax import config as config_lib
from farmer_jax import terminal
from farmer_jax.xla import flops


class Throughput:
  """Measures the speed of training steps and shows a progress bar.

  Time spent in `paused` does not count as training.
  """

  def __init__(self, config: config_lib.Config, first_step: int):
    self._train = config.train
    # The FLOP count is valid for the likelihood only, not for a distillation step.
    self._flops = flops.training_step(config)
    peak = flops.chip(jax.devices()[0].device_kind).peak_flops
    self._peak = peak and config.job == 'pretrain' and peak * jax.device_count()
    self._bar = terminal.progress_bar('training', 'step', config.train.steps, first_step)
    self._previous: dict[str, Array] | None = None  # metrics of the step before the current one
    self._reset()

  def _reset(self) -> None:
    self._start = time.monotonic()
    self._paused_seconds = self._input_seconds = 0.0
    self._steps = 0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Context whose time does not count as training.

    If `rates` is called inside the context, the time before this call does count, because it is
    the time that the metrics of the step take to arrive.
    """
    start = time.monotonic()
    yield
    self._paused_seconds += time.monotonic() - max(start, self._start)

  @contextlib.contextmanager
  def waiting_for_input(self) -> Iterator[None]:
    """Context whose time is reported as `input_wait_seconds`."""
    start = time.monotonic()
    yield
    self._input_seconds += time.monotonic() - start

  def count_step(self, step: int, metrics: dict[str, Array]) -> None:
    """Counts a dispatched step. Waits for the previous one: at most two steps are in flight."""
    self._steps += 1
    if self._previous is not None:
      jax.block_until_ready(self._previous)
      if step % self._train.log_every == 0:
        shown = {name: f'{float(value):.3f}' for name, value in self._previous.items()}
        self._bar.set_postfix(shown, refresh=False)
    names = {'loss': 'loss', 'bits_per_dim': 'bits/dim'}
    self._previous = {names[name]: metrics[name] for name in names if name in metrics}
    self._bar.update()

  def rates(self) -> dict[str, float]:
    """Returns the speed since the previous call. The current step must have finished."""
    seconds = (time.monotonic() - self._start - self._paused_seconds) / self._steps
    rates = {
      'step_seconds': seconds,
      'images_per_second': self._train.batch_size / seconds,
      'input_wait_seconds': self._input_seconds / self._steps,
    }
    if self._peak:
      rates['mfu'] = self._flops / seconds / self._peak
    self._reset()
    return rates

  def rewind(self, step: int) -> None:
    """Moves the progress bar to an earlier step and restarts the measurement."""
    self._bar.n = step
    self._bar.refresh()
    self._previous = None
    self._reset()

  def close(self) -> None:
    self._bar.close()
