"""The training loop, shared by every job that trains."""

import functools
import time

import jax
from clu import parameter_overview

from farmer_jax import terminal
from farmer_jax.checkpoints import checkpointer
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.distributed import preemption
from farmer_jax.training import divergence
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import state as state_lib
from farmer_jax.training import step as step_lib
from farmer_jax.training import throughput as meter_lib
from farmer_jax.workdir import metrics


def train(
  config,
  workdir,
  mesh,
  *,
  init_params,
  loss_fn,
  iterator,
  validate,
  draw,
  constants=None,
  diagnose=None,
):
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
    diagnose: diagnose(params, batch, step) -> what is amiss with a batch that gives no usable
      gradient, as `divergence.Watch` takes it.

  Returns:
    The final `TrainState` and the last validation metrics.

  Raises:
    ConfigError: training diverges, again and again; or the last checkpoint cannot be written.
    Preempted: this process was told to leave, and has saved the state.
  """
  with preemption.Notice() as notice:
    watch = divergence.Watch(config.train, workdir, diagnose)
    run = _Run(config, workdir, mesh, iterator, validate, draw, notice, watch)
    run.begin(init_params, loss_fn, constants or {})
    return run.to_the_end()


class _Run:
  """A training run: its state, its place in the data, and what goes on around the steps."""

  def __init__(self, config, workdir, mesh, iterator, validate, draw, notice, watch):
    self.config, self.workdir, self.mesh = config, workdir, mesh
    self.iterator, self.start = iterator, iterator.get_state()
    self.validate, self.draw = validate, draw
    self.notice, self.watch = notice, watch
    self.checkpoints = checkpointer.Checkpointer(workdir, config.train)
    self.learning_rate = optimizer_lib.learning_rate_schedule(config.train)
    self.valid: dict[str, float] = {}

  def begin(self, init_params, loss_fn, constants):
    """Finds out where the run is, and compiles the step."""
    config, mesh, iterator = self.config, self.mesh, self.iterator
    self.constants = constants
    optimizer = optimizer_lib.create(config.train)
    self.initial_state = functools.partial(
      _initial_state, config, mesh, init_params, optimizer, constants
    )
    self.state, self.step = self.checkpoints.resume(self.initial_state(), iterator)
    if self.step:
      terminal.say(f'Going on from step {self.step} of {config.train.steps}.')
    else:
      terminal.tell(
        parameter_overview.get_parameter_overview(self.state.params, include_stats=False)
      )
    self.writer = metrics.MetricWriter(self.workdir, self.step)
    step_fn = step_lib.make_train_step(loss_fn, optimizer, config.train)
    self.compiled = _compile(step_fn, mesh, self.state, iterator, constants)
    self.meter = meter_lib.Meter(config, self.step)
    self.trace = meter_lib.Trace(config.profile, self.workdir)

  def to_the_end(self):
    """Takes all steps that are left; returns as `train` does."""
    steps = self.config.train.steps
    if self.step == steps and self.config.train.validate_every:
      self.valid = self.validate(self.state.best_params)
    while self.step < steps:
      batch, values = self._take_step()
      if self.watch.must_go_back(values):
        self._go_back(batch)
        continue
      with self.meter.pause():
        self._finish_step()
        if self.step < steps and self.notice.reached(self.step):
          self._leave()
    self._close()
    return self.state, self.valid

  def _take_step(self):
    """One optimizer step, logged if it is its turn; returns its batch and metrics."""
    self.step += 1
    settings = self.config.train
    with self.meter.pause():
      self.trace.before(self.step)
    with self.meter.input():
      batch = self.mesh.batch(next(self.iterator))
    self.state, values = self.compiled(self.state, batch, self.constants)
    self.meter.advance(self.step, values)
    with self.meter.pause():
      self.trace.after(self.step, values)
    if self.step % settings.log_every == 0 or self.step == settings.steps:
      self._log(jax.device_get(values))
    return batch, values

  def _log(self, values):
    """Writes the metrics of a step, which are on the host."""
    values = dict(values)
    del values['skipped_in_a_row']
    updates = self.step - 1 - int(values['skipped_updates'])
    values |= self.meter.rates() | {'learning_rate': self.learning_rate(max(updates, 0))}
    # What goes wrong with the data is rare, and a column of zeros no news.
    faults = self.iterator.counts() | {'data_order': self.iterator.order}
    values |= {name: count for name, count in faults.items() if count}
    self.writer.write(self.step, 'train', values)
    self.watch.look_at(self.step, values)

  def _finish_step(self):
    """Whatever is due after a step."""
    settings, step, params = self.config.train, self.step, self.state.best_params
    due = functools.partial(_due, step, settings.steps)
    if due(settings.validate_every):
      self.valid = self.validate(params)
      self.writer.write(step, 'valid', self.valid)
      self.meter.note_validation(step, self.valid)
    if due(settings.sample_every):
      self.writer.write_image(step, 'samples', self.draw(params, step))
    if due(settings.checkpoint_every):
      loss = self.valid['loss'] if due(settings.validate_every) else None
      self.checkpoints.save(step, self.state, self.iterator, loss)

  def _go_back(self, batch):
    """Returns to the newest checkpoint, or to the beginning, and goes on with other data."""
    self.checkpoints.wait()
    self.watch.report(self.step, self.state.params, batch)
    shapes = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self.state
    )
    self.state = None  # two would not fit everywhere
    self.iterator.set_state(self.start)
    self.state, self.step = self.checkpoints.resume(shapes, self.iterator)
    if not self.step:
      self.state = self.initial_state()
    self.iterator.change_order()
    terminal.say(
      f'Going on from step {self.step}, the data in another order ({self.iterator.order}).'
    )
    self.writer.close()
    self.writer = metrics.MetricWriter(self.workdir, self.step)
    self.meter.go_back(self.step)

  def _leave(self):
    """Saves and leaves, to be started again."""
    if not _due(self.step, self.config.train.steps, self.config.train.checkpoint_every):
      self.checkpoints.save(self.step, self.state, self.iterator)
    self._close()
    raise preemption.Preempted(f'Saved step {self.step}; the same command goes on from there.')

  def _close(self):
    self.trace.close()
    self.meter.close()
    self.writer.close()
    self.checkpoints.close()


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
  terminal.say('Compiling the training step ...')
  start = time.monotonic()
  place = iterator.get_state()
  batch = mesh.batch(next(iterator))
  iterator.set_state(place)
  lowered = step_lib.lower(step_fn, mesh, state, batch, constants)
  compiled = lowered.compile(step_lib.COMPILER_OPTIONS.get(jax.default_backend()))
  terminal.say(f'... took {time.monotonic() - start:.1f} s.')
  return compiled
