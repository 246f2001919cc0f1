"""Checks the values of all keys, individually and in combination."""

import math
import operator
import re
import reprlib
from collections.abc import Iterator

from farmer_jax.config import schema
from farmer_jax.config.sections import Config
from farmer_jax.errors import ConfigError

# Steps, seeds and sizes are int32 on devices.
_INT_LIMIT = 2**31

# Larger or smaller floats can overflow or underflow float32 in computations.
_SMALLEST_FLOAT, _FLOAT_LIMIT = 1e-30, 1e6

# Field of `Range` -> comparison that a value and this bound must satisfy.
_COMPARISONS = dict(at_least=operator.ge, above=operator.gt, at_most=operator.le, below=operator.lt)

_COUPLING = 'the inverse of config.model.flow.kind=coupling already takes one pass per block'


def check(config: Config) -> None:
  """Raises `ConfigError` if a value is out of range or if values contradict each other."""
  checks = [_ranges, _names, _model, _training, _start, _guidance, _sampling]
  by_job = {
    'pretrain': [_fidelity_of_training],
    'distill': [_distillation, _fidelity_of_training],
    'likelihood': [_likelihood],
    'fidelity': [_fidelity],
    'export': [_export],
  }
  checks += by_job.get(config.job, [])
  for find_problems in checks:
    for problem in find_problems(config):
      raise ConfigError(problem)


def step_range(text: str) -> tuple[int, int] | None:
  """Parses `Profile.steps`. Returns the first and last step, or None if `text` is empty."""
  if not text:
    return None
  match = re.fullmatch(r'\s*(\d{1,10})\s*,\s*(\d{1,10})\s*', text)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last:
    setting = f'config.profile.steps={reprlib.repr(text)}'
    raise ConfigError(f'{setting} must be two step numbers, for example 10,15')
  return first, last


def guidance_scales(text: str) -> tuple[float, ...]:
  """Parses `Train.fidelity_scales`."""
  try:
    scales = tuple(map(float, text.split(',')))
  except ValueError:
    scales = (-1.0,)
  if not all(0 <= scale < _FLOAT_LIMIT for scale in scales):
    setting = f'config.train.fidelity_scales={reprlib.repr(text)}'
    raise ConfigError(f'{setting} must be numbers of at least 0, for example 0,1.5')
  return scales


def _ranges(config: Config) -> Iterator[str]:
  """Checks every number against the range of its key."""
  for path, key in schema.leaves():
    value = schema.get(config, path)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      continue
    setting = f'config.{path}={reprlib.repr(value)}'
    is_float = isinstance(value, float)
    if is_float and not math.isfinite(value):
      yield f'{setting} must be finite'
    if is_float and 0 < abs(value) < _SMALLEST_FLOAT:
      yield f'{setting} must be 0 or at least {_SMALLEST_FLOAT}'
    below = min(key.range.below, _FLOAT_LIMIT if is_float else _INT_LIMIT)
    for name, bound in key.range._replace(below=below)._asdict().items():
      if not _COMPARISONS[name](value, bound):
        yield f'{setting} must be {name.replace("_", " ")} {bound}'


def _names(config: Config) -> Iterator[str]:
  """Checks keys that name files. A configuration of another user must not point elsewhere."""
  for path in ('name', 'likelihood.name', 'fidelity.name'):
    name = schema.get(config, path)
    # The name of a run can contain folders, for example sweep/run1.
    parts = [] if name is None else name.split('/') if path == 'name' else [name]
    if not all(re.fullmatch(r'[\w.,=+@ -]{1,150}', part) and part.strip('. ') for part in parts):
      yield (
        f'config.{path}={reprlib.repr(name)} must be a file name: letters, digits, spaces and'
        ' . , = + @ - _'
      )


def _model(config: Config) -> Iterator[str]:
  data, model = config.data, config.model
  flow, prior, no_flow = model.flow, model.prior, 'config.model.flow.blocks=0'
  if prior.kind == 'mixture':
    yield from _transformer('prior', prior.width, prior.head_dim, prior.mlp_ratio)
  if flow.blocks:
    yield from _transformer('flow', flow.width, flow.head_dim, flow.mlp_ratio)
  if prior.kind == 'normal' and not flow.blocks:
    yield f'config.model.{prior.kind=} and {no_flow} leave no parameters to train; change one'
  if data.image_size % model.patch_size:
    yield f'config.{data.image_size=} must be divisible by config.{model.patch_size=}'
  if prior.informative_channels >= config.token_channels:
    yield (
      f'config.model.{prior.informative_channels=} must be less than {config.token_channels}, the'
      ' number of channels of a token; 0 makes all of them informative'
    )
  if flow.kind == 'coupling' and flow.blocks and config.token_channels == 1:
    yield (
      f'config.model.{flow.kind=} splits the channels of a token, but'
      f' config.{model.patch_size=} makes tokens of one channel; increase the patch size'
    )
  if config.num_tokens == 1 and flow.kind == 'autoregressive' and flow.blocks:
    yield f'config.{model.patch_size=} makes one token per image; reduce it, or set {no_flow}'
  if flow.class_conditional and not data.num_classes:
    yield f'config.model.{flow.class_conditional=} needs classes, but config.{data.num_classes=}'


def _transformer(name: str, width: int, head_dim: int, mlp_ratio: float) -> Iterator[str]:
  section = f'config.model.{name}'
  if width % head_dim:
    yield f'{section}.{width=} must be a multiple of {section}.{head_dim=}'
  if mlp_ratio * width < 1:
    yield f'{section}.{mlp_ratio=} must be at least {1 / width:g}, because {section}.{width=}'


def _training(config: Config) -> Iterator[str]:
  train = config.train
  if train.batch_size % train.accumulation_steps:
    yield f'config.{train.batch_size=} must be divisible by config.{train.accumulation_steps=}'
  _ = train.schedules  # raises an error if it cannot be parsed
  step_range(config.profile.steps)
  if config.job == 'compile' and config.teacher is not None:
    yield '--job=compile compiles only pretraining; remove config.teacher'


def _start(config: Config) -> Iterator[str]:
  if config.init_from and config.branch_from:
    yield 'config.init_from and config.branch_from exclude each other; set one of them to None'
  if config.init_parts != 'all' and not config.init_from:
    yield f'config.{config.init_parts=} needs config.init_from'.replace('config.config', 'config')
  for key in ('init_from', 'branch_from'):
    if config.job == 'distill' and schema.get(config, key):
      yield f'--job=distill starts from the flow of config.teacher; remove config.{key}'


def _guidance(config: Config) -> Iterator[str]:
  data, model = config.data, config.model
  if config.sampling.guidance.active and not config.supports_guidance:
    yield (
      'guidance needs config.model.prior.kind=mixture, classes and label dropout, not'
      f' config.{model.prior.kind=}, config.{data.num_classes=} and config.{model.label_dropout=};'
      ' set config.sampling.guidance.scale=0'
    )


def _sampling(config: Config) -> Iterator[str]:
  sampling = config.sampling
  if sampling.inverse == 'student':
    if config.model.flow.kind == 'coupling':
      yield f'config.{sampling.inverse=} needs an autoregressive flow; {_COUPLING}'
    if config.teacher is None and config.job != 'distill':
      yield 'config.sampling.inverse=student needs a student; use the workdir of --job=distill'
    if sampling.refinement_rounds and config.distill.objective != 'outputs':
      setting = f'config.{sampling.refinement_rounds=}'
      yield f'{setting} must be 0 unless config.distill.objective=outputs'
    if sampling.refinement_rounds and config.distill.denoise:
      yield (
        f'config.{sampling.refinement_rounds=} must be 0 with config.distill.denoise=True, because'
        ' refinement converges to the noisy image'
      )
  if sampling.densities and config.student_denoises:
    yield (
      f'config.{sampling.densities=} needs samples with noise, but the student removes the noise'
      ' (config.distill.denoise=True); set config.sampling.inverse=auto'
    )
  if sampling.denoise and config.noise.kind != 'gaussian':
    yield 'config.sampling.denoise=True needs a model trained with config.noise.kind=gaussian'


def _distillation(config: Config) -> Iterator[str]:
  if config.teacher is None:
    yield '--job=distill needs a teacher; set --config.teacher to the workdir of a trained run'
  if config.model.flow.kind == 'coupling':
    yield f'--job=distill needs an autoregressive flow; {_COUPLING}'
  if not config.model.flow.blocks:
    yield '--job=distill needs a model with a flow, but config.model.flow.blocks=0'
  distill, flow = config.distill, config.model.flow
  if distill.width % flow.head_dim:
    yield f'config.{distill.width=} must be a multiple of config.model.{flow.head_dim=}'
  if distill.denoise:
    setting = f'config.{distill.denoise=}'
    if config.noise.kind != 'gaussian':
      yield f'{setting} needs a teacher trained with config.noise.kind=gaussian'
    if not distill.all_tokens:
      yield (
        f'{setting} needs config.distill.all_tokens=True, because the first token stays noisy'
        ' otherwise'
      )
    if distill.generated_fraction:
      yield (
        f'{setting} needs config.distill.generated_fraction=0, because generated images have no'
        ' version without noise'
      )
  if distill.perceptual_weight and not config.data.num_classes:
    yield f'config.{distill.perceptual_weight=} needs classes, but config.data.num_classes=0'


def _likelihood(config: Config) -> Iterator[str]:
  likelihood, num_classes = config.likelihood, config.data.num_classes
  if likelihood.noise_std is not None and config.noise.kind != 'gaussian':
    yield 'config.likelihood.noise_std needs a model trained with config.noise.kind=gaussian'
  if likelihood.condition == 'marginal' and not num_classes:
    yield 'config.likelihood.condition=marginal needs classes, but config.data.num_classes=0'
  if likelihood.condition == 'none' and num_classes and not config.model.label_dropout:
    yield (
      'config.likelihood.condition=none needs a model trained with label dropout, but'
      ' config.model.label_dropout=0; set config.likelihood.condition=marginal'
    )
  if likelihood.ood_source is not None and likelihood.condition == 'label' and num_classes:
    yield 'config.likelihood.ood_source needs config.likelihood.condition=none or marginal'


def _fidelity_of_training(config: Config) -> Iterator[str]:
  train, fidelity = config.train, config.fidelity
  if not train.fidelity_every:
    if train.best_metric == 'fidelity':
      yield f'config.{train.best_metric=} needs config.train.fidelity_every above 0'
    return
  if config.training_feature_network == 'inception':
    if fidelity.weights is None:
      yield f'config.{fidelity.network=} needs config.fidelity.weights'
  elif not config.data.num_classes:
    yield (
      'config.train.fidelity_every without classes (config.data.num_classes=0) needs Inception; set'
      ' config.fidelity.weights'
    )
  if any(guidance_scales(train.fidelity_scales)) and not config.supports_guidance:
    yield (
      f'config.{train.fidelity_scales=} needs a model that supports guidance (classes, label'
      ' dropout and a mixture prior); set config.train.fidelity_scales=0'
    )
  yield from _numbers_of_images(config, 'train.fidelity_count')


def _fidelity(config: Config) -> Iterator[str]:
  fidelity, inception = config.fidelity, config.feature_network == 'inception'
  if not inception and not config.data.num_classes:
    yield 'config.data.num_classes=0 needs config.fidelity.network=inception'
  if inception and fidelity.weights is None:
    yield (
      'Inception-v3 needs config.fidelity.weights: the path of pt_inception-2015-12-05-6726825d.pth'
      ' from the release fid_weights of github.com/mseitzer/pytorch-fid'
    )
  yield from _numbers_of_images(config, 'fidelity.count')


def _numbers_of_images(config: Config, count: str) -> Iterator[str]:
  """Checks that quality can be computed. `count` is the key of the number of samples."""
  fidelity = config.fidelity
  for path in (count, 'fidelity.reference_count', 'fidelity.pairwise_images'):
    value = schema.get(config, path)
    # The Inception Score divides the samples into ten parts.
    if value is not None and value <= max(10, fidelity.neighbors):
      yield f'config.{path}={value} must be above 10 and config.{fidelity.neighbors=}'


def _export(config: Config) -> Iterator[str]:
  license_ = config.export.license
  if license_ is not None and not re.fullmatch(r'[a-z0-9][a-z0-9.+-]{0,50}', license_):
    yield (
      f'config.export.license={reprlib.repr(license_)} must be an identifier of the Hugging Face'
      ' hub, for example apache-2.0'
    )
