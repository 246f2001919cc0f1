"""Keys of training, distillation, devices and compilation."""

import dataclasses
import re
from typing import Literal, NamedTuple

from farmer_jax.config.fields import (
  BelowOne,
  Changeable,
  Fraction,
  NonNegativeFloat,
  NonNegativeInt,
)
from farmer_jax.config.sections.model import Flow
from farmer_jax.errors import ConfigError


class Schedule(NamedTuple):
  """A schedule of the learning rate, from step `start` (steps completed before it) to `steps`.

  A schedule of the kind `restretch` is the one of a run that has `steps` steps from the beginning,
  and is also a schedule of the noise. `restart_cosine` is a cosine that begins at `start`.
  """

  start: int
  steps: int
  kind: str = 'restretch'


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Muon or AdamW, with linear warm-up and cosine decay."""

  kind: Literal['muon', 'adamw'] = 'muon'
  """muon: Muon for the matrices inside transformer layers, and AdamW for all other parameters.
  adamw: AdamW for all parameters."""
  learning_rate: float = 3e-3
  """Peak learning rate at width 128, reached at the end of the warm-up. For other widths, each kind
  of parameters has a factor, which the log shows."""
  final_learning_rate: NonNegativeFloat = 1e-6
  """Learning rate at the last step."""
  warmup_steps: NonNegativeInt = 50
  """Steps of linear warm-up."""
  muon_momentum: BelowOne = 0.95
  """Muon: decay rate of the momentum."""
  b1: BelowOne = 0.9
  """AdamW: decay rate of the first moment."""
  b2: BelowOne = 0.95
  """AdamW: decay rate of the second moment."""
  weight_decay: NonNegativeFloat = 0.03
  """Decoupled weight decay of matrices. Biases and embeddings are not decayed."""
  clip_norm: NonNegativeFloat = 1.0
  """Largest global norm of the gradient. 0 does not clip gradients."""


@dataclasses.dataclass(frozen=True)
class Tracker:
  """A service that shows the metrics of training, in addition to the files in the workdir."""

  kind: Literal['none', 'wandb'] = 'none'
  """wandb: Weights & Biases, with the settings of its environment variables, for example
  WANDB_MODE=offline and WANDB_ENTITY."""
  project: str = 'farmer_jax'
  """Project of the run there."""
  name: str | None = None
  """Name of the run there. None is the key name."""
  tags: str = ''
  """Tags, separated by commas."""


@dataclasses.dataclass(frozen=True)
class Train:
  """The training loop."""

  steps: int = 1000
  """Number of optimizer steps."""
  extend: Changeable[Literal['none', 'restart_cosine', 'keep_final', 'restretch']] = 'none'
  """What happens if steps is larger than in the run in the workdir. none: the run is refused.
  restart_cosine: from its newest checkpoint, the learning rate falls from learning_rate to
  final_learning_rate along a new cosine without warm-up. keep_final: the learning rate stays at
  final_learning_rate after the former number of steps. restretch: from its newest checkpoint, the
  learning rate and the noise are those of a run that had the larger number from the start. With
  restart_cosine and keep_final, the noise stays at its final value after the former number of
  steps. With branch_from, other values than none do the same for the steps of the new run."""
  extensions: str = ''
  """The former extensions of this run, which training records: STEP:FORMER_STEPS:EXTEND, separated
  by commas."""
  batch_size: int = 64
  """Images per step, over all devices."""
  accumulation_steps: int = 1
  """Equal parts of a batch, which the step processes one at a time. Gradients are averaged."""
  ema_decay: BelowOne = 0.0
  """Decay rate of the EMA of the parameters, which evaluation and sampling use. 0 disables it."""
  log_every: Changeable[int] = 20
  """Steps between records of training metrics."""
  validate_every: Changeable[NonNegativeInt] = 500
  """Steps between validations. Validation also runs after the last step. 0 disables validation."""
  sample_every: Changeable[NonNegativeInt] = 500
  """Steps between sample grids. A grid is also drawn after the last step. 0 draws no grids."""
  checkpoint_every: Changeable[NonNegativeInt] = 500
  """Steps between checkpoints. One is also written after the last step. 0 disables checkpoints."""
  keep_checkpoints: Changeable[int] = 2
  """Number of newest checkpoints to keep."""
  keep_best: Changeable[NonNegativeInt] = 0
  """Number of additional checkpoints to keep: the best checkpoints by best_metric."""
  best_metric: Changeable[Literal['loss', 'fidelity']] = 'loss'
  """loss: lowest validation loss. fidelity: lowest Fréchet distance over the guidance scales in
  fidelity_scales. Only checkpoints of steps at which the metric was computed are compared."""
  keep_every: Changeable[NonNegativeInt] = 0
  """Checkpoints of steps divisible by this number are never deleted. 0 disables the rule."""
  max_grad_norm_ratio: NonNegativeFloat = 30.0
  """Largest ratio of the gradient norm to its running geometric mean. Updates above it are skipped,
  after the first 100 updates. Updates with a non-finite loss or gradient are always skipped. 0
  disables the limit."""
  max_consecutive_skips: Changeable[int] = 10
  """Consecutive skipped updates that cause a rollback: the run restores its newest checkpoint and
  continues with another data order."""
  max_rollbacks: Changeable[NonNegativeInt] = 3
  """Largest number of rollbacks. One more stops the run with a diagnosis."""
  valid_batch_size: int = 250
  """Images per validation batch, over all devices."""
  valid_examples: Changeable[int | None] = None
  """Number of validation images, from the start of the split. None uses all images."""
  fidelity_every: Changeable[NonNegativeInt] = 0
  """Steps between measurements of sample quality, which also run after the last step: Fréchet
  distance, precision and recall, with the settings of config.sampling and config.fidelity. The
  network is Inception-v3 if fidelity.weights is set, and otherwise the classifier, unless
  fidelity.network selects one. 0 disables the measurements."""
  fidelity_count: Changeable[int] = 2000
  """Number of samples for each guidance scale."""
  fidelity_scales: Changeable[str] = '0,1'
  """Guidance scales of the samples, separated by commas. They replace sampling.guidance.scale."""
  optimizer: Optimizer = Optimizer()

  @property
  def evaluated_params(self) -> str:
    """Name, in `TrainState` and in checkpoints, of the parameters that evaluation uses."""
    return 'ema_params' if self.ema_decay else 'params'

  def extending(self, former: 'Train', step: int) -> 'Train':
    """Returns these settings, with the record that they continue `former` from `step` on."""
    # A run without a checkpoint starts again, with the schedule of its new number of steps.
    entry = f'{step}:{former.steps}:{self.extend if step else "restretch"}'
    extensions = ','.join(filter(None, (former.extensions, entry)))
    return dataclasses.replace(self, extensions=extensions)

  @property
  def schedules(self) -> tuple[Schedule, ...]:
    """The schedules of the run in the order of their first steps. Each one replaces those before.

    Raises:
      ConfigError: `extensions` has another format.
    """
    entry = r'(\d{1,10}):(\d{1,10}):(restart_cosine|keep_final|restretch)'
    texts = self.extensions.split(',') if self.extensions else []
    matches = [re.fullmatch(entry, text) for text in texts]
    if None in matches:
      raise ConfigError(
        f'config.train.extensions={self.extensions[:100]!r} must record former extensions, for'
        ' example 1000:1000:keep_final; remove it'
      )
    entries = [(int(m[1]), int(m[2]), m[3]) for m in matches if m]
    ends = [former for _, former, _ in entries] + [self.steps]
    later = [Schedule(e[0], end, e[2]) for e, end in zip(entries, ends[1:], strict=True)]
    return Schedule(0, ends[0]), *(s for s in later if s.kind != 'keep_final')


@dataclasses.dataclass(frozen=True)
class Distill:
  """Distillation: --job=distill trains a student that inverts each flow block in one pass."""

  objective: Literal['outputs', 'hidden'] = 'outputs'
  """outputs: match the output of each student block to the teacher's. hidden: match the hidden
  states of each student block to the teacher's outputs by a linear map, and only the final output
  to the image."""
  input_noise_std: NonNegativeFloat = 0.3
  """Largest standard deviation of the Gaussian noise added to the student's input. The standard
  deviation of each image is drawn uniformly between 0 and this value."""
  generated_fraction: Fraction = 0.0
  """Fraction of each batch that is sampled from the teacher with the settings of config.sampling.
  The other images of the batch are training images."""
  all_tokens: bool = False
  """Whether the transformers of the student read all N tokens. Otherwise they read N - 1 tokens,
  like those of the teacher: the last token is not read, and the first token does not change."""
  layers: NonNegativeInt = 0
  """Transformer layers of each student block. The student starts from this number of layers of the
  teacher, at equal distances. 0: as many as the teacher has."""
  width: NonNegativeInt = 0
  """Width of the student's transformers. A student of another width than the teacher starts from
  random values instead of the teacher's parameters. 0: the width of the teacher."""
  normalize_targets: bool = False
  """Divide the squared errors of an image, except those of the final output, by the mean square of
  the image's targets in the same block. The norms of latents then do not weigh the blocks."""
  denoise: bool = False
  """noise.kind=gaussian: compare the final output with the image without noise, so that the student
  also removes the noise. Its samples need no sampling.denoise. Requires all_tokens."""
  perceptual_weight: NonNegativeFloat = 0.0
  """Weight in the loss of the difference between the features of the final output and of the image,
  relative to the features of the image. The features are those of the classifier of --job=fidelity,
  which is trained first. 0 uses no classifier."""

  def student_flow(self, flow: Flow) -> Flow:
    """Returns the section `flow` with the sizes of the student."""
    layers, width = self.layers or flow.layers, self.width or flow.width
    return dataclasses.replace(flow, layers=layers, width=width)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The device mesh, and the sharding rules of the parameters.

  Batches are sharded over the axes data and fsdp. The mesh changes results only by rounding. In
  sampling and evaluation, each process has its own mesh, whose axis data has the remaining devices.
  """

  data: NonNegativeInt = 0
  """Size of the mesh axis data. 0 uses all remaining devices."""
  fsdp: NonNegativeInt = 1
  """Size of the mesh axis fsdp. 0 uses all remaining devices."""
  tensor: NonNegativeInt = 1
  """Size of the mesh axis tensor. 0 uses all remaining devices."""
  embed: str = 'fsdp'
  """Mesh axes, separated by commas, that shard parameters along the width of a transformer."""
  hidden: str = 'tensor'
  """Mesh axes, separated by commas, that shard attention heads and the hidden width of MLPs."""
  outputs: str = 'tensor'
  """Mesh axes, separated by commas, that shard output projections along their outputs: shifts,
  log-scales and mixture parameters."""


@dataclasses.dataclass(frozen=True)
class Profile:
  """The JAX profiler."""

  steps: str = ''
  """First and last training step to record, for example 10,15. The trace is written to
  WORKDIR/profile, for TensorBoard or XProf. Empty records nothing."""


@dataclasses.dataclass(frozen=True)
class Compile:
  """Ahead-of-time compilation: --job=compile."""

  topology: str | None = None
  """Devices to compile for: a slice of TPUs, for example v5e:16x16 or v5p:4x4x8, or GPUs of one
  host, for example h100:8, or of several hosts, for example h100:4x8 for four hosts of eight. The
  chips are v5e, v5p, v6e, a100, h100, h200 and b200. They need not be available, but the compiler
  must be installed. None compiles for the available devices."""
  sampler: bool = False
  """Compile the sampler in addition to the training step."""
