"""The training loop, shared by all jobs that train."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from clu import parameter_overview
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax.checkpoints import Checkpointer
from farmer_jax.data import pipeline
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.distributed import preemption
from farmer_jax.nn import scaling
from farmer_jax.training import divergence
from farmer_jax.training import hooks as hooks_lib
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import start as start_lib
from farmer_jax.training import step as step_lib
from farmer_jax.training import throughput as throughput_lib
from farmer_jax.workdir import metrics as metrics_lib
from farmer_jax.xla import memory


@dataclasses.dataclass
class Trainer:
  """A training run.

  Attributes:
    config: the full configuration.
    workdir: a claimed workdir.
    mesh: the devices and the rules for sharding arrays over them.
    init_params: init_params(key, *frozen) -> parameters, boxed with their logical axis names.
    loss_fn: see `step.make_train_step`.
    iterator: yields the shard of each training batch that this process reads.
    writer: where metrics are written.
    validation: runs every `config.train.validate_every` steps. Checkpoints record its loss.
    fidelity: runs every `config.train.fidelity_every` steps, if not None. Checkpoints record its
      score.
    hooks: additional hooks, which run after validation and before a checkpoint is written.
    frozen: parameters on the mesh that training does not change, such as teacher parameters.
    diagnose: see `divergence.DivergenceMonitor`.
    start: the run from which this run starts, if not from random parameters. `init_params` then
      takes its parameters as an additional argument.
  """

  config: config_lib.Config
  workdir: epath.Path
  mesh: mesh_lib.Mesh
  init_params: Callable[..., step_lib.Params]
  loss_fn: step_lib.LossFn
  iterator: pipeline.TrainIterator
  writer: metrics_lib.MetricWriter
  validation: hooks_lib.Validation
  fidelity: hooks_lib.Validation | None = None
  hooks: Sequence[hooks_lib.Hook] = ()
  frozen: tuple[step_lib.Params, ...] = ()
  diagnose: divergence.Diagnose | None = None
  start: start_lib.Start | None = None

  # Known once the state has shapes, and once the training step is compiled.
  _state_shapes: step_lib.TrainState | None = dataclasses.field(default=None, init=False)
  _train_step: Any = dataclasses.field(default=None, init=False)

  def train(self) -> step_lib.TrainState:
    """Trains until step `config.train.steps`. Resumes from the newest valid checkpoint, if any.

    Returns the final state.

    Raises:
      DivergenceError: training diverged again after the allowed number of rollbacks.
      CheckpointError: no existing checkpoint is valid, or the last one could not be written.
      Preempted: a process received a signal to stop, and the state was saved.
    """
    with preemption.PreemptionListener() as listener, memory.attributed(self._memory_usage):
      state, step = self._set_up()
      # Closes the progress bar before an error is printed.
      with contextlib.closing(self._throughput):
        if step == self.config.train.steps and self.config.train.validate_every:
          self.validation.evaluate(state.evaluation_params)  # A complete run reports again.
        if self.start and not step and self.config.train.validate_every:
          with self._throughput.paused():
            self.validation(hooks_lib.StepInfo(0, state, {}, self.writer))
        return self._run_steps(state, step, listener)

  def _set_up(self) -> tuple[step_lib.TrainState, int]:
    """Compiles the training step and creates the hooks. Returns the state and its step."""
    train = self.config.train
    self._optimizer = optimizer_lib.create(self.config)
    self._schedule = optimizer_lib.learning_rate_schedule(train)
    self._initial_iterator_state = self.iterator.get_state()
    self._checkpointer = Checkpointer(self.workdir, train)
    init = step_lib.initializer(self.init_params, self._optimizer, train.ema_decay)
    self._initial_args = jax.random.key(self.config.seed), *self.frozen
    self._state_shapes = self.mesh.abstract(jax.eval_shape(init, *self._initial_args))
    state, step = self._restore()
    if step:
      logging.info(f'Resuming from step {step} of {train.steps}.')
    else:
      overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
      logging.info(f'Parameters:\n{overview}')
      logging.info(f'Kinds of parameters:\n{scaling.table(state.params, self.config)}')
    self._train_step = self._compile(state)
    self.writer.rewind(step or -1)  # without metrics of step 0
    self._throughput = throughput_lib.Throughput(self.config, step)
    self._monitor = divergence.DivergenceMonitor(train, self.workdir, self.diagnose)
    self._profiler = hooks_lib.Profiler(self.config.profile, self.workdir)
    self._save = hooks_lib.Hook(self._save_checkpoint, train.checkpoint_every)
    self._all_hooks = [
      hooks_lib.Hook(self._profiler, every=1),
      hooks_lib.Hook(self._write_metrics, train.log_every),
      hooks_lib.Hook(self.validation, train.validate_every),
      *([hooks_lib.Hook(self.fidelity, train.fidelity_every)] if self.fidelity else []),
      *self.hooks,
      self._save,
    ]
    return state, step

  def _restore(self) -> tuple[step_lib.TrainState, int]:
    """Returns the state of the newest valid checkpoint and its step, or the first state.

    The first state has random parameters, or those or the state of another run, see `start`. All
    arrays are sharded from the start.
    """
    state, step = self._checkpointer.restore_latest(self._state_shapes, self.iterator)
    if step:
      return state, step
    if self.start and self.start.branch:
      state, step = self._checkpointer.restore_other(*self.start.branch, state, self.iterator)
      if self.config.train.checkpoint_every:
        self._checkpointer.save(step, state, self.iterator)
      return state, step
    init = step_lib.initializer(self.init_params, self._optimizer, self.config.train.ema_decay)
    args = *self._initial_args, *([self.start.restore(self.mesh)] if self.start else [])
    shardings = jax.tree.map(lambda a: a.sharding, self._state_shapes)
    return jax.jit(lambda *args: mesh_lib.unboxed(init(*args)), out_shardings=shardings)(*args), 0

  def _compile(self, state: step_lib.TrainState) -> jax.stages.Compiled:
    """Compiles the training step for the shapes of the next batch, and logs the compile time."""
    logging.info('Compiling the training step ...')
    start = time.monotonic()
    iterator_state = self.iterator.get_state()
    batch = self.mesh.global_batch(next(self.iterator))
    self.iterator.set_state(iterator_state)
    step_fn = step_lib.make_train_step(self.loss_fn, self._optimizer, self.config.train)
    lowered = step_lib.lower(step_fn, self.mesh, state, batch, self.frozen)
    compiled = lowered.compile(step_lib.compiler_options(jax.default_backend()))
    logging.info(f'Compiled in {time.monotonic() - start:.1f} s.')
    return compiled

  def _run_steps(
    self, state: step_lib.TrainState, step: int, listener: preemption.PreemptionListener
  ) -> step_lib.TrainState:
    """Runs the steps after `step`. A rollback returns to an earlier step."""
    last_step = self.config.train.steps
    while step < last_step:
      step += 1
      self._profiler.start(step)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        with self._throughput.waiting_for_input():
          batch = self.mesh.global_batch(next(self.iterator))
        state, metrics = self._train_step(state, batch, *self.frozen)
        self._throughput.count_step(step, metrics)

      if self._monitor.has_diverged(metrics):
        self._checkpointer.wait()
        self._monitor.report(step, state.params, batch)
        del state  # Frees the arrays. Two states may not fit in device memory.
        state, step = self._roll_back()
        continue

      with self._throughput.paused():
        info = hooks_lib.StepInfo(step, state, metrics, self.writer)
        for hook in self._all_hooks:
          if hook.is_due(step, last_step):
            hook.function(info)
        if step < last_step and listener.should_stop(step):
          if not self._save.is_due(step, last_step):
            self._save.function(info)
          self._close()
          raise preemption.Preempted(f'Saved step {step}. Run the same command to resume.')
    self._close()
    return state

  def _memory_usage(self) -> str:
    """Describes what takes memory on each device."""
    shapes, parts = self._state_shapes, []
    if shapes is not None:
      parts = [
        memory.of_arrays('parameters', (shapes.params, shapes.ema_params, self.frozen)),
        memory.of_arrays('optimizer state', shapes.opt_state),
      ]
    if self._train_step:
      parts.append(memory.describe_program('training step', self._train_step))
    return f'per device: {", ".join(parts) or "unknown"}'

  def _roll_back(self) -> tuple[step_lib.TrainState, int]:
    """Restores the newest valid checkpoint or the first state. Changes the order of the data."""
    self.iterator.set_state(self._initial_iterator_state)
    state, step = self._restore()
    self.iterator.change_order()
    logging.info(f'Resuming from step {step} with data order {self.iterator.order}.')
    self.writer.rewind(step)
    self._throughput.rewind(step)
    return state, step

  def _write_metrics(self, info: hooks_lib.StepInfo) -> None:
    """Fetches the metrics of a training step from the devices and writes them."""
    values = dict(jax.device_get(info.metrics))
    del values['consecutive_skips']
    updates = info.step - 1 - int(values['skipped_updates'])
    values |= self._throughput.rates() | {'learning_rate': self._schedule(max(updates, 0))}
    # Faults and rollbacks are rare, so only values above zero are written.
    faults = self.iterator.counts() | {'data_order': self.iterator.order}
    values |= {name: count for name, count in faults.items() if count}
    info.writer.write(info.step, 'train', values)
    self._monitor.check_log_dets(info.step, values)

  def _save_checkpoint(self, info: hooks_lib.StepInfo) -> None:
    loss = self.validation.score_at(info.step)
    fidelity = self.fidelity.score_at(info.step) if self.fidelity else None
    info.writer.flush()
    self._checkpointer.save(info.step, info.state, self.iterator, loss, fidelity)

  def _close(self) -> None:
    """Completes all outputs. Raises CheckpointError if the last checkpoint was not written."""
    self._profiler.close()
    self.writer.flush()
    self._checkpointer.close()
