"""The training loop, shared by all jobs that train."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
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
from farmer_jax.training import state as state_lib
from farmer_jax.training import step as step_lib
from farmer_jax.training import throughput as throughput_lib
from farmer_jax.workdir import metrics as metrics_lib


@dataclasses.dataclass
class _Run:
  """Settings and objects that all steps of a training run share."""

  steps: int
  workdir: epath.Path
  mesh: mesh_lib.Mesh
  train_step: Callable[..., Any]
  init: Callable[[], state_lib.TrainState]
  iterator: pipeline.TrainIterator
  initial_iterator_state: dict[str, Any]
  frozen: tuple[state_lib.Params, ...]
  checkpointer: Checkpointer
  writer: metrics_lib.MetricWriter
  throughput: throughput_lib.Throughput
  monitor: divergence.DivergenceMonitor
  profiler: hooks_lib.Profiler
  hooks: Sequence[hooks_lib.Hook]
  save: hooks_lib.Hook


def train(
  config: config_lib.Config,
  workdir: epath.Path,
  mesh: mesh_lib.Mesh,
  *,
  init_params: Callable[..., state_lib.Params],
  loss_fn: step_lib.LossFn,
  iterator: pipeline.TrainIterator,
  validation: hooks_lib.Validation,
  hooks: Sequence[hooks_lib.Hook] = (),
  frozen: tuple[state_lib.Params, ...] = (),
  diagnose: divergence.Diagnose | None = None,
) -> state_lib.TrainState:
  """Trains until step `config.train.steps`. Resumes from the newest valid checkpoint, if any.

  Returns the final state.

  Args:
    config: the full configuration.
    workdir: a claimed workdir.
    mesh: the devices and the rules for sharding arrays over them.
    init_params: init_params(key, *frozen) -> parameters, boxed with their logical axis names.
    loss_fn: see `step.make_train_step`.
    iterator: yields the shard of each training batch that this process reads.
    validation: runs every `config.train.validate_every` steps. Checkpoints record its loss.
    hooks: additional hooks, which run after validation and before a checkpoint is written.
    frozen: parameters on the mesh that training does not change, such as teacher parameters.
    diagnose: see `divergence.DivergenceMonitor`.

  Raises:
    DivergenceError: training diverged again after the allowed number of rollbacks.
    CheckpointError: no existing checkpoint is valid, or the last one could not be written.
    Preempted: a process received SIGTERM, and the state was saved.
  """
  with preemption.PreemptionListener() as listener:
    optimizer = optimizer_lib.create(config)
    init = _initializer(config, mesh, init_params, optimizer, frozen)
    run, state, step = _set_up(
      config, workdir, mesh, init, optimizer, loss_fn, iterator, validation, hooks, frozen, diagnose
    )
    # Closes the progress bar before an error is printed.
    with contextlib.closing(run.throughput):
      if step == config.train.steps and config.train.validate_every:
        validation.evaluate(state.evaluation_params)  # A complete run reports again.
      return _run_steps(run, state, step + 1, listener)


def _run_steps(
  run: _Run, state: state_lib.TrainState, first: int, listener: preemption.PreemptionListener
) -> state_lib.TrainState:
  """Runs training steps from `first` to the last step. A rollback returns to an earlier step."""
  while first <= run.steps:
    for step in range(first, run.steps + 1):
      run.profiler.start(step)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        with run.throughput.waiting_for_input():
          batch = run.mesh.global_batch(next(run.iterator))
        state, metrics = run.train_step(state, batch, *run.frozen)
        run.throughput.count_step(step, metrics)

      if run.monitor.has_diverged(metrics):
        run.checkpointer.wait()
        run.monitor.report(step, state.params, batch)
        # Frees the arrays. Two states may not fit in device memory.
        state = _abstract(state)
        state, restored = _roll_back(run, state)
        first = restored + 1
        break

      with run.throughput.paused():
        info = hooks_lib.StepInfo(step, state, metrics, run.writer)
        for hook in run.hooks:
          if hook.is_due(step, run.steps):
            hook.function(info)
        if step < run.steps and listener.should_stop(step):
          if not run.save.is_due(step, run.steps):
            run.save.function(info)
          _close(run)
          raise preemption.Preempted(f'Saved step {step}. Run the same command to resume.')
    else:
      break
  _close(run)
  return state


def _roll_back(run: _Run, abstract_state: state_lib.TrainState) -> tuple[state_lib.TrainState, int]:
  """Restores the newest valid checkpoint or the initial state. Changes the order of the data."""
  run.iterator.set_state(run.initial_iterator_state)
  state, step = run.checkpointer.restore_latest(abstract_state, run.iterator)
  if not step:
    state = run.init()
  run.iterator.change_order()
  logging.info(f'Resuming from step {step} with data order {run.iterator.order}.')
  run.writer.close()
  run.writer = metrics_lib.MetricWriter(run.workdir, step)
  run.throughput.rewind(step)
  return state, step


def _set_up(
  config: config_lib.Config,
  workdir: epath.Path,
  mesh: mesh_lib.Mesh,
  init: Callable[[], state_lib.TrainState],
  optimizer: optax.GradientTransformationExtraArgs,
  loss_fn: step_lib.LossFn,
  iterator: pipeline.TrainIterator,
  validation: hooks_lib.Validation,
  hooks: Sequence[hooks_lib.Hook],
  frozen: tuple[state_lib.Params, ...],
  diagnose: divergence.Diagnose | None,
) -> tuple[_Run, state_lib.TrainState, int]:
  """Compiles the training step and creates the hooks. Returns the run, its state and its step."""
  steps, initial_iterator_state = config.train.steps, iterator.get_state()
  checkpointer = Checkpointer(workdir, config.train)
  state, step = checkpointer.restore_latest(init(), iterator)
  if step:
    logging.info(f'Resuming from step {step} of {steps}.')
  else:
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    logging.info(f'Parameters:\n{overview}')
    logging.info(f'Kinds of parameters:\n{scaling.table(state.params, config)}')
  step_fn = step_lib.make_train_step(loss_fn, optimizer, config.train)
  train_step = _compile(step_fn, mesh, state, iterator, frozen)
  throughput = throughput_lib.Throughput(config, step)
  monitor = divergence.DivergenceMonitor(config.train, workdir, diagnose)
  profiler = hooks_lib.Profiler(config.profile, workdir)
  schedule = optimizer_lib.learning_rate_schedule(config.train)

  def save_checkpoint(info: hooks_lib.StepInfo) -> None:
    checkpointer.save(info.step, info.state, iterator, validation.loss_at(info.step))

  log = hooks_lib.MetricLogger(schedule, throughput, monitor, iterator)
  save = hooks_lib.Hook(save_checkpoint, config.train.checkpoint_every)
  run = _Run(
    steps=steps,
    workdir=workdir,
    mesh=mesh,
    train_step=train_step,
    init=init,
    iterator=iterator,
    initial_iterator_state=initial_iterator_state,
    frozen=frozen,
    checkpointer=checkpointer,
    writer=metrics_lib.MetricWriter(workdir, step),
    throughput=throughput,
    monitor=monitor,
    profiler=profiler,
    hooks=[
      hooks_lib.Hook(profiler, every=1),
      hooks_lib.Hook(log, config.train.log_every),
      hooks_lib.Hook(validation, config.train.validate_every),
      *hooks,
      save,
    ],
    save=save,
  )
  return run, state, step


def _initializer(
  config: config_lib.Config,
  mesh: mesh_lib.Mesh,
  init_params: Callable[..., state_lib.Params],
  optimizer: optax.GradientTransformationExtraArgs,
  frozen: tuple[state_lib.Params, ...],
) -> Callable[[], state_lib.TrainState]:
  """Returns a function that creates the initial state, with all arrays sharded from the start."""
  init = state_lib.initializer(init_params, optimizer, config.train.ema_decay)
  key = jax.random.key(config.seed)

  def run() -> state_lib.TrainState:
    shardings = mesh.shardings(jax.eval_shape(init, key, *frozen))
    compiled = jax.jit(lambda *args: mesh_lib.unboxed(init(*args)), out_shardings=shardings)
    return compiled(key, *frozen)

  return run


def _compile(
  step_fn: step_lib.StepFn,
  mesh: mesh_lib.Mesh,
  state: state_lib.TrainState,
  iterator: pipeline.TrainIterator,
  frozen: tuple[state_lib.Params, ...],
) -> Callable[..., Any]:
  """Compiles the training step for the shapes of the next batch, and logs the compile time."""
  logging.info('Compiling the training step ...')
  start = time.monotonic()
  iterator_state = iterator.get_state()
  batch = mesh.global_batch(next(iterator))
  iterator.set_state(iterator_state)
  lowered = step_lib.lower(step_fn, mesh, state, batch, frozen)
  compiled = lowered.compile(step_lib.COMPILER_OPTIONS.get(jax.default_backend()))
  logging.info(f'Compiled in {time.monotonic() - start:.1f} s.')
  return compiled


def _abstract(state: state_lib.TrainState) -> state_lib.TrainState:
  """Returns the shapes, dtypes and shardings of a state."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def _close(run: _Run) -> None:
  """Closes all outputs. Raises CheckpointError if the last checkpoint was not written."""
  run.profiler.close()
  run.writer.close()
  run.checkpointer.close()
