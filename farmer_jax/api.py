"""Parameters from the checkpoints of runs."""

import functools
import json

import jax

from farmer_jax import config as config_lib
from farmer_jax import errors
from farmer_jax.checkpoints import restore
from farmer_jax.nn import farmer
from farmer_jax.workdir import layout

_TEACHER_FILE = 'teacher.json'

# What a student shares with its teacher.
_SHARED = (
  'model.patch_size',
  'model.label_dropout',
  'model.flow.',
  'model.prior.',
  'noise.kind',
  'noise.std_end',
  'data.image_size',
  'data.channels',
  'data.num_classes',
)


def load_params(config, workdir, model):
  """The parameters to sample and to evaluate with, from the newest checkpoint, and its step.

  Those of a student's run are the teacher's, and the student's as `student`.
  """
  if config.teacher is None:
    shapes = _shapes(model)
    return _read(config, workdir, shapes)
  teacher, _ = load_teacher(config, workdir, model)
  shapes = {'student': _shapes(model)['flow']}
  student, step = _read(config, workdir, shapes)
  return teacher | student, step


def load_teacher(config, workdir, model):
  """The parameters that a student's run in `workdir`, begun or not, learns from.

  Returns:
    The parameters, and what `keep_teacher` should write down: the teacher's checkpoint step and
    configuration.

  Raises:
    ConfigError: there is no teacher, or it is not (or no longer) the one of this run.
  """
  file, run = layout.absolute(workdir) / _TEACHER_FILE, layout.absolute(config.teacher)
  try:
    saved = layout.read_config(run)
  except errors.ConfigError as error:
    raise errors.ConfigError(f"{error}; name the teacher's run: --config.teacher=RUN") from None
  found = layout.differences(config, saved, _SHARED)
  if found:
    raise errors.ConfigError(
      f'the teacher {run} is another model ({"; ".join(found)}); give both the same settings'
    )
  teacher = config_lib.from_config_dict(saved)
  known = layout.read_json(file, _is_teacher) if file.exists() else None
  if known:
    found = layout.differences(teacher, known['config'])
    if found:
      raise errors.ConfigError(
        f'the teacher {run} is not the run that this student learned from ({"; ".join(found)});'
        ' name that one: --config.teacher=RUN'
      )
  params, step = _read(teacher, run, _shapes(model), known and known['step'])
  return params, {'step': step, 'config': saved}


def _is_teacher(value):
  return (
    isinstance(value, dict)
    and isinstance(value.get('config'), dict)
    and type(value.get('step')) is int
  )


def keep_teacher(workdir, teacher):
  """Writes down which teacher a student has."""
  text = json.dumps(teacher, indent=2) + '\n'
  layout.write_atomically(workdir / _TEACHER_FILE, text)


def _shapes(model):
  return jax.eval_shape(functools.partial(farmer.init_params, model=model), jax.random.key(0))


def _read(config, workdir, shapes, step=None):
  """Parameters of the newest checkpoint that is whole, or of that of `step`; and the step."""
  name = 'average' if config.train.ema_decay else 'params'
  return restore.load_params(layout.absolute(workdir), name, shapes, step)
