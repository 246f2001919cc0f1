"""The training loop, shared by every job that trains."""

import functools
import time

import jax
from clu import parameter_overview

from farmer_jax import config as config_lib
from farmer_jax.runtime import checkpoint, console, flops, metrics
from farmer_jax.runtime import mesh as mesh_lib
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import state as state_lib
from farmer_jax.training import step as step_lib


def train(config, workdir, mesh, *, init_params, loss_fn, iterator, validate, draw, constants=None):
  """Trains until `config.train.steps`, going on from the newest checkpoint in `workdir` if any.

  Args:
    config: the whole `config.Config`.
    workdir: a prepared workdir.
    mesh: a `mesh.Mesh`, over which everything is spread.
    init_params: init_params(key, **constants) -> parameters, in boxes with the names of their axes.
    loss_fn: as `step.make_train_step` wants it.
    iterator: checkpointable iterator over this process's share of training batches.
    validate: validate(params) -> dict of floats.
    draw: draw(params, step) -> uint8 picture [H, W, 3], which it has also saved.
    constants: arrays on the mesh that training leaves as they are and `loss_fn` takes by name, a
      dict.

  Returns:
    The final `TrainState` and the last validation metrics.
  """
  settings, constants = config.train, constants or {}
  optimizer = optimizer_lib.create(settings)
  state = _initial_state(config, mesh, init_params, optimizer, constants)
  checkpoints = checkpoint.Checkpoints(workdir, settings)
  state, first_step = checkpoints.resume(state, iterator)
  if first_step:
    console.say(f'Going on from step {first_step} of {settings.steps}.')
  else:
    console.tell(parameter_overview.get_parameter_overview(state.params, include_stats=False))
  writer = metrics.MetricWriter(workdir, first_step)
  step_fn = step_lib.make_train_step(loss_fn, optimizer, settings)
  compiled = _compile(step_fn, mesh, state, iterator, constants)
  meter = Meter(config, first_step)
  learning_rate = optimizer_lib.learning_rate_schedule(settings)
  valid = {}

  def finish(step, state):
    """Whatever is due after `step`."""
    nonlocal valid
    due = functools.partial(_due, step, settings.steps)
    if due(settings.validate_every):
      valid = validate(state.best_params)
      writer.write(step, 'valid', valid)
      meter.note_validation(step, valid)
    if due(settings.sample_every):
      writer.write_image(step, 'samples', draw(state.best_params, step))
    if due(settings.checkpoint_every):
      loss = valid['loss'] if due(settings.validate_every) else None
      checkpoints.save(step, state, iterator, loss)

  if first_step == settings.steps and settings.validate_every:
    valid = validate(state.best_params)
  trace = Trace(config.profile, workdir)
  for step in range(first_step + 1, settings.steps + 1):
    with meter.pause():
      trace.before(step)
    with meter.input():
      batch = mesh.batch(next(iterator))
    state, values = compiled(state, batch, constants)
    meter.advance(step, values)
    with meter.pause():
      trace.after(step, values)
    if step % settings.log_every == 0 or step == settings.steps:
      values = jax.device_get(values)
      writer.write(
        step, 'train', values | meter.rates() | {'learning_rate': learning_rate(step - 1)}
      )
    with meter.pause():
      finish(step, state)
  trace.close()
  meter.close()
  writer.close()
  checkpoints.close()
  return state, valid


def _due(step, steps, every):
  return every and (step % every == 0 or step == steps)


def _initial_state(config, mesh, init_params, optimizer, constants):
  """The state before the first step; no array in it is ever whole on one device that is split."""
  init = state_lib.initializer(init_params, optimizer, config.train.ema_decay)
  key = jax.random.key(config.seed)
  shardings = mesh.shardings(jax.eval_shape(init, key, constants))
  initialize = jax.jit(lambda *args: mesh_lib.unboxed(init(*args)), out_shardings=shardings)
  return initialize(key, constants)


def _compile(step_fn, mesh, state, iterator, constants):
  """Compiles the step ahead of the first batch, so that its time is known and said."""
  console.say('Compiling the training step ...')
  start = time.monotonic()
  place = iterator.get_state()
  batch = mesh.batch(next(iterator))
  iterator.set_state(place)
  lowered = step_lib.lower(step_fn, mesh, state, batch, constants)
  compiled = lowered.compile(step_lib.COMPILER_OPTIONS.get(jax.default_backend()))
  console.say(f'... took {time.monotonic() - start:.1f} s.')
  return compiled


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
      console.say(f'A trace of training steps is in {self._folder}')


class Meter:
  """Shows progress and measures speed, leaving out what is not training."""

  def __init__(self, config, first_step):
    self._batch_size = config.train.batch_size
    self._log_every = config.train.log_every
    # Of the density alone: a distillation step does other work.
    self._flops = flops.training_step(config)
    peak = flops.peak(jax.devices()[0].device_kind)
    self._peak = peak and config.job == 'pretrain' and peak * jax.device_count()
    self._bar = console.progress('training', 'step', config.train.steps, first_step)
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

  def note_validation(self, step, values):
    """Prints validation metrics above the bar."""
    figures = '  '.join(f'{name} {value:.4f}' for name, value in values.items())
    console.say(f'step {step}  validation: {figures}')

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
