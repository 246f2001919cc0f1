"""Hooks of the training loop: functions that run every n steps."""

import dataclasses
import operator
import tempfile
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax.training import step as step_lib
from farmer_jax.workdir import layout, stores
from farmer_jax.workdir import metrics as metrics_lib


@dataclasses.dataclass(frozen=True)
class StepInfo:
  """Argument of a hook: a training step and its results."""

  step: int
  state: step_lib.TrainState
  metrics: dict[str, jax.Array]
  writer: metrics_lib.MetricWriter


@dataclasses.dataclass(frozen=True)
class Hook:
  """A function that runs after training steps."""

  function: Callable[[StepInfo], None]
  every: int  # interval in steps; also runs after the last step, unless 0 disables it

  def is_due(self, step: int, last_step: int) -> bool:
    """Returns whether the hook runs after `step`."""
    return self.every > 0 and (step % self.every == 0 or step == last_step)


class Validation:
  """Hook that evaluates the parameters. `metrics` holds the results of the last evaluation.

  `split` names the metrics in metrics.jsonl. `score` computes from the metrics the number by which
  checkpoints are compared. Lower is better.
  """

  def __init__(
    self,
    evaluator: Callable[[step_lib.Params], dict[str, float]],
    split: str = 'valid',
    score: Callable[[dict[str, float]], float] = operator.itemgetter('loss'),
  ):
    self._evaluator, self._split, self._score = evaluator, split, score
    self._step: int | None = None
    self.metrics: dict[str, float] = {}

  def evaluate(self, params: step_lib.Params) -> None:
    self.metrics = self._evaluator(params)

  def __call__(self, info: StepInfo) -> None:
    self.evaluate(info.state.evaluation_params)
    self._step = info.step
    info.writer.write(info.step, self._split, self.metrics)
    shown = '  '.join(f'{name} {value:.4f}' for name, value in self.metrics.items())
    title = {'valid': 'validation'}.get(self._split, self._split)
    logging.info(f'step {info.step}  {title}: {shown}')

  def score_at(self, step: int) -> float | None:
    """Returns the score at `step`, or None if the hook did not run at this step."""
    return self._score(self.metrics) if self._step == step else None


class Profiler:
  """Records a trace of a range of steps for TensorBoard and XProf.

  The training loop calls `start` before each step and the hook after it. A trace for an object
  store is written locally and copied, because JAX writes traces only to file systems.
  """

  def __init__(self, profile: config_lib.Profile, workdir: epath.Path):
    self._folder = workdir / 'profile'
    self._first, self._last = config_lib.step_range(profile.steps) or (0, 0)
    self._local: tempfile.TemporaryDirectory[str] | None = None
    self._running = False

  def start(self, step: int) -> None:
    """Starts the trace if `step` is in the range and no trace is running."""
    if self._first <= step <= self._last and not self._running:
      if stores.is_store(self._folder):
        self._local = tempfile.TemporaryDirectory(prefix='profile-')
      jax.profiler.start_trace(self._local.name if self._local else str(self._folder))
      self._running = True

  def __call__(self, info: StepInfo) -> None:
    """Stops the trace after the last step of the range."""
    if info.step == self._last:
      jax.block_until_ready(info.metrics)
      self.close()

  def close(self) -> None:
    """Stops the trace if it is running."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      if self._local:
        with layout.optional_write('The trace'), self._local as folder:
          stores.copy_files(folder, self._folder)
      logging.info(f'Trace of training steps: {self._folder}')
