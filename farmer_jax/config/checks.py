"""Which settings cannot work, alone or together."""

import math
import re
import reprlib

from farmer_jax.config.schema import get, leaves
from farmer_jax.errors import ConfigError

# What int32 holds, in which steps, seeds and sizes are counted.
_INTEGERS_BELOW = 2**31

# Numbers of other sizes overflow float32, or vanish in it, where they meet others.
_SMALLEST, _LARGEST = 1e-30, 1e6


def check(config):
  """Raises `ConfigError` for settings that contradict each other."""
  data, model, train = config.data, config.model, config.train
  flow, prior = model.flow, model.prior

  def require(condition, message):
    if not condition:
      raise ConfigError(message)

  _check_ranges(config, require)
  _check_names(config, require)
  require(
    data.image_size % model.patch_size == 0,
    f'config.data.image_size={data.image_size} is not divisible by'
    f' config.model.patch_size={model.patch_size}',
  )
  parts = [('prior', prior)] if prior.kind == 'mixture' else []
  for name, part in parts + ([('flow', flow)] if flow.blocks else []):
    require(
      part.width % part.head_dim == 0,
      f'config.model.{name}.width={part.width} is not a multiple of'
      f' config.model.{name}.head_dim={part.head_dim}',
    )
    require(
      part.mlp_ratio * part.width >= 1,
      f'config.model.{name}.mlp_ratio={part.mlp_ratio} leaves nothing of'
      f' config.model.{name}.width={part.width}; it must be at least {1 / part.width:g}',
    )
  channels = data.channels * model.patch_size**2
  informative = prior.informative_channels
  require(
    informative < channels,
    f'config.model.prior.informative_channels={informative} must be below {channels}, the channels'
    ' of a token (0 makes all of them informative)',
  )
  require(
    data.image_size // model.patch_size > 1 or not flow.blocks,
    'an image of one patch leaves the flow nothing to do; take a smaller config.model.patch_size,'
    ' or turn it off with config.model.flow.blocks=0',
  )
  require(
    train.batch_size % train.accumulate == 0,
    f'config.train.batch_size={train.batch_size} is not divisible by'
    f' config.train.accumulate={train.accumulate}',
  )
  require(
    data.num_classes or not flow.class_conditional,
    'config.model.flow.class_conditional needs classes; config.data.num_classes is 0',
  )
  step_range(config.profile.steps)
  _check_sampling(config, require)
  if config.job == 'distill':
    _check_distill(config, require)
  if config.job == 'likelihood':
    _check_likelihood(config, require)
  if config.job == 'fidelity':
    _check_fidelity(config, require)
  require(
    config.job != 'compile' or config.teacher is None,
    '--job=compile compiles pretraining; this configuration distils a teacher',
  )


def step_range(text):
  """The two numbers of `Profile.steps`, or None."""
  if not text:
    return None
  words = re.fullmatch(r'\s*(\d{1,10})\s*,\s*(\d{1,10})\s*', text)
  numbers = [int(word) for word in words.groups()] if words else [0, 0]
  if not 1 <= numbers[0] <= numbers[1]:
    raise ConfigError(
      f'config.profile.steps={reprlib.repr(text)} must be two numbers of steps, as in 10,15'
    )
  return numbers[0], numbers[1]


def _check_sampling(config, require):
  """Requires what sampling is asked for to exist in the model."""
  guidance = config.sampling.guidance
  if guidance.method != 'none' and (guidance.scale or guidance.final_scale):
    require(
      config.model.prior.kind == 'mixture',
      'guidance needs a prior of mixtures; set config.sampling.guidance.scale=0',
    )
    require(
      config.data.num_classes and config.model.label_dropout,
      'guidance compares a class with "no class", which this model has not learned'
      ' (config.data.num_classes or config.model.label_dropout is 0); set'
      ' config.sampling.guidance.scale=0',
    )
  student = config.sampling.inverse == 'student'
  require(
    not student or config.teacher is not None,
    'config.sampling.inverse=student needs a student, which this run has not; train one with'
    ' --job=distill and sample from its workdir',
  )
  require(
    not (student and config.sampling.refinement_rounds) or config.distill.objective == 'stages',
    'config.sampling.refinement_rounds starts from the outputs of the blocks of the student, which'
    " config.distill.objective=hidden lets differ from the teacher's; set it to 0",
  )
  require(
    not config.sampling.denoise or config.noise.kind == 'gaussian',
    'config.sampling.denoise needs a model trained with config.noise.kind=gaussian',
  )


def _check_distill(config, require):
  """Requires a teacher, and a flow to learn."""
  require(config.teacher is not None, 'name the trained run to distil: --config.teacher=RUN')
  require(
    config.model.flow.blocks,
    'config.model.flow.blocks=0 leaves no flow to distil',
  )
  share = config.distill.drawn_share
  require(share <= 1, f'config.distill.drawn_share={share} must not be above 1')


def _check_likelihood(config, require):
  """Requires the asked-for density to be one that the model has."""
  settings, classes = config.likelihood, config.data.num_classes
  require(
    settings.noise_std is None or config.noise.kind == 'gaussian',
    'config.likelihood.noise_std is for models trained with config.noise.kind=gaussian; this one'
    ' has uniform dequantisation',
  )
  require(
    settings.condition != 'marginal' or classes,
    'config.likelihood.condition=marginal needs classes, and this model has none',
  )
  require(
    settings.condition != 'none' or not classes or config.model.label_dropout,
    'this model has not learned to do without a class (config.model.label_dropout=0); take'
    ' config.likelihood.condition=marginal',
  )
  require(
    settings.other_source is None or settings.condition != 'label' or not classes,
    'images of config.likelihood.other_source have none of the classes of this model; set'
    ' config.likelihood.condition=none or marginal',
  )


def fidelity_network(config):
  """The network that config.fidelity asks for, by name."""
  if config.fidelity.network != 'auto':
    return config.fidelity.network
  small = config.data.channels == 1 or config.data.image_size < 32
  return 'classifier' if small else 'inception'


def _check_fidelity(config, require):
  """Requires a network, and images enough for the figures."""
  settings = config.fidelity
  inception = fidelity_network(config) == 'inception'
  require(
    inception or config.data.num_classes,
    'without classes no classifier can be trained to judge samples; set'
    ' config.fidelity.network=inception',
  )
  require(
    not inception or settings.weights is not None,
    'Inception needs its weights: config.fidelity.weights=pt_inception-2015-12-05-6726825d.pth,'
    ' from the release fid_weights of github.com/mseitzer/pytorch-fid',
  )
  for name in ('count', 'reference_count', 'compared'):
    value = getattr(settings, name)
    require(
      value is None or value > max(10, settings.neighbours),
      f'config.fidelity.{name}={value} is too small: the Inception Score takes ten parts, and'
      f' precision and recall {settings.neighbours} neighbours',
    )


def _check_names(config, require):
  """Requires what files and folders are named after to lead to no other place: the configuration
  may come with a run that somebody else made."""

  def is_name(text):
    return re.fullmatch(r'[\w.,=+@ -]{1,150}', text) and text.strip('. ')

  for path in ('name', 'likelihood.name', 'fidelity.name'):
    name = get(config, path)
    # A run may lie in a folder of runs.
    parts = [] if name is None else name.split('/') if path == 'name' else [name]
    require(
      all(is_name(part) for part in parts),
      f'config.{path}={reprlib.repr(name)} must be a name for files: letters, digits and any of'
      ' . , = + @ - _',
    )


def _check_ranges(config, require):
  """Requires each number to lie where it has a meaning."""
  for path, field in leaves():
    value = get(config, path)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      continue
    if isinstance(value, int):
      shown = reprlib.repr(value)
      require(value < _INTEGERS_BELOW, f'config.{path}={shown} must be below {_INTEGERS_BELOW}')
    else:
      require(math.isfinite(value), f'config.{path}={value} must be finite')
      require(value < _LARGEST, f'config.{path}={value} must be below {_LARGEST:g}')
      require(
        value == 0 or abs(value) >= _SMALLEST,
        f'config.{path}={value} must be at least {_SMALLEST:g}',
      )
    least, below = field.metadata['least'], field.metadata['below']
    if least is None:
      require(value > 0, f'config.{path}={value} must be above 0')
    else:
      require(value >= least, f'config.{path}={value} must not be below {least}')
    require(below is None or value < below, f'config.{path}={value} must be below {below}')
