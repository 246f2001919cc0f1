"""What a training run shows of itself while it runs: speed, progress, and traces."""

import time

import jax

from farmer_jax import config as config_lib
from farmer_jax import terminal
from farmer_jax.xla import flops


class Trace:
  """Records what the devices do in some steps, for TensorBoard and XProf."""

  def __init__(self, settings, workdir):
    self._folder = workdir / 'profile'
    steps: tuple[int, int] = config_lib.step_range(settings.steps) or (0, 0)
    self._first, self._last = steps
    self._running = False

  def before(self, step):
    """Starts before the first of these steps, or of those that a resumed run has left."""
    if self._first <= step <= self._last and not self._running:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step, values):
    """Ends with the last of them; `values` are a result of the step."""
    if step == self._last:
      jax.block_until_ready(values)
      self.close()

  def close(self):
    """Ends, if that has not happened."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      terminal.say(f'A trace of training steps is in {self._folder}')


class Meter:
  """Shows progress and measures speed, leaving out what is not training."""

  def __init__(self, config, first_step):
    self._batch_size = config.train.batch_size
    self._log_every = config.train.log_every
    # Of the density alone: a distillation step does other work.
    self._flops = flops.training_step(config)
    peak = flops.peak(jax.devices()[0].device_kind)
    self._peak = peak and config.job == 'pretrain' and peak * jax.device_count()
    self._bar = terminal.progress('training', 'step', config.train.steps, first_step)
    self._previous = None  # metrics of the step before, whose computation is surely under way
    self._reset()

  def _reset(self):
    self._start, self._paused, self._waited, self._steps = time.monotonic(), 0.0, 0.0, 0

  def input(self):
    """Context that counts its time as waiting for data."""
    return _Timed(lambda seconds: setattr(self, '_waited', self._waited + seconds))

  def pause(self):
    """Context whose time does not count as training."""
    return _Timed(lambda seconds: setattr(self, '_paused', self._paused + seconds))

  def advance(self, step, values):
    """Counts a step that was dispatched; waits for the one before, so that few are in flight."""
    self._steps += 1
    if self._previous is not None:
      jax.block_until_ready(self._previous)
      if step % self._log_every == 0:
        self._bar.set_postfix(_shown(self._previous), refresh=False)
    self._previous = values['loss'], values.get('bits_per_dim')
    self._bar.update()

  def rates(self):
    """Speed since the last call; call it when the step's values are on the host."""
    seconds = (time.monotonic() - self._start - self._paused) / self._steps
    rates = {
      'step_seconds': seconds,
      'images_per_second': self._batch_size / seconds,
      'input_wait_seconds': self._waited / self._steps,
    }
    if self._peak:
      rates['mfu'] = self._flops / seconds / self._peak
    self._reset()
    return rates

  def go_back(self, step):
    """Goes on counting from an earlier step."""
    self._bar.n = step
    self._bar.refresh()
    self._previous = None
    self._reset()

  def note_validation(self, step, values):
    """Prints validation metrics above the bar."""
    figures = '  '.join(f'{name} {value:.4f}' for name, value in values.items())
    terminal.say(f'step {step}  validation: {figures}')

  def close(self):
    """Leaves the finished bar standing."""
    self._bar.close()


class _Timed:
  def __init__(self, record):
    self._record = record

  def __enter__(self):
    self._start = time.monotonic()

  def __exit__(self, *exception):
    self._record(time.monotonic() - self._start)


def _shown(values):
  """The postfix of the progress bar."""
  loss, bits = values
  shown = {'loss': f'{float(loss):.3f}'}
  if bits is not None:
    shown['bits/dim'] = f'{float(bits):.3f}'
  return shown
