"""All configuration keys: defaults, units and meanings."""

import dataclasses
from typing import Any, Literal

from farmer_jax.config.fields import Changeable, NonNegativeInt
from farmer_jax.config.sections.evaluation import Export, Fidelity, Guidance, Likelihood, Sampling
from farmer_jax.config.sections.model import Data, Flow, Model, Noise, Prior
from farmer_jax.config.sections.training import (
  Compile,
  Distill,
  Mesh,
  Optimizer,
  Profile,
  Tracker,
  Train,
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of a run and of the jobs on it."""

  name: str = 'farmer'
  """Name of the run. The default workdir is runs/<name>, and RUN with --config=from_run:RUN."""
  job: Changeable[
    Literal['pretrain', 'distill', 'sample', 'likelihood', 'fidelity', 'compile', 'export']
  ] = 'pretrain'
  """Job to run."""
  teacher: Changeable[str | None] = None
  """distill: workdir of the trained run that is the teacher."""
  init_from: str | None = None
  """pretrain: a trained run, one of its checkpoints, RUN/checkpoints/STEP, or an export. Training
  starts from its parameters (those of its EMA, if it has one), with a new optimizer, at step 0. The
  number of classes and the image size can differ. Validation also runs before the first step."""
  init_parts: Literal['all', 'flow', 'prior'] = 'all'
  """The parameters that init_from provides. flow: the prior starts from random parameters. prior:
  the flow does."""
  branch_from: str | None = None
  """pretrain: a run, or one of its checkpoints, RUN/checkpoints/STEP, that this run continues in
  its own workdir, with parameters, optimizer, data order and step. Settings of training, such as
  the learning rate, the number of steps and the noise, can differ."""
  results: Changeable[str | None] = None
  """sample, likelihood and fidelity: folder for the results, for example if the run is read-only.
  None writes to the workdir."""
  seed: NonNegativeInt = 0
  """Random seed of initialization, data order and noise."""
  data: Data = Data()
  noise: Noise = Noise()
  model: Model = Model()
  train: Train = Train()
  mesh: Changeable[Mesh] = Mesh()
  profile: Changeable[Profile] = Profile()
  tracker: Changeable[Tracker] = Tracker()
  sampling: Changeable[Sampling] = Sampling()
  distill: Distill = Distill()
  likelihood: Changeable[Likelihood] = Likelihood()
  compile: Changeable[Compile] = Compile()
  fidelity: Changeable[Fidelity] = Fidelity()
  export: Changeable[Export] = Export()

  def with_sampling(self, **changes: Any) -> 'Config':
    """Returns a copy with other values in the section `sampling`."""
    return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, **changes))

  @property
  def num_tokens(self) -> int:
    """Number of tokens N of an image."""
    return self.model.num_tokens(self.data.image_size)

  @property
  def token_channels(self) -> int:
    """Number of channels d of a token."""
    return self.model.token_channels(self.data.channels)

  @property
  def supports_guidance(self) -> bool:
    """Whether the model has the densities with and without a class, which guidance compares."""
    has_classes = self.data.num_classes > 0 and self.model.label_dropout > 0
    return self.model.prior.kind == 'mixture' and has_classes

  @property
  def student_denoises(self) -> bool:
    """Whether a student inverts the flow and also removes the noise."""
    return self.sampling.inverse == 'student' and self.distill.denoise

  @property
  def computes_densities(self) -> bool:
    """Whether --job=sample computes the densities of samples."""
    return self.sampling.densities or (self.sampling.figures and not self.student_denoises)

  @property
  def feature_network(self) -> str:
    """Network of --job=fidelity, 'inception' or 'classifier', with 'auto' resolved."""
    if self.fidelity.network != 'auto':
      return self.fidelity.network
    small = self.data.channels == 1 or self.data.image_size < 32
    return 'classifier' if small else 'inception'

  @property
  def training_feature_network(self) -> Literal['inception', 'classifier']:
    """Network of `train.fidelity_every`: with 'auto', Inception if it has weights."""
    if self.fidelity.network != 'auto':
      return self.fidelity.network
    return 'classifier' if self.fidelity.weights is None else 'inception'
