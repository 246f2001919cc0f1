"""The teacher of a student's run: the run whose flow a student learns to invert.

A distillation run records the configuration and the checkpoint step of its teacher in
WORKDIR/teacher.json. After a restart, and in every later job, the parameters of the teacher come
from exactly this checkpoint.
"""

import functools
import json
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from farmer_jax import checkpoints, errors
from farmer_jax import config as config_lib
from farmer_jax.nn import farmer
from farmer_jax.workdir import layout

_TEACHER_FILE = 'teacher.json'

# Settings that a student and its teacher must have in common: key prefixes.
_SHARED_SETTINGS = (
  *('model.patch_size', 'model.label_dropout', 'model.flow.', 'model.prior.'),
  *('noise.kind', 'noise.std_end', 'data.image_size', 'data.channels', 'data.num_classes'),
)


def load_teacher(
  config: config_lib.Config, workdir: epath.PathLike
) -> tuple[PyTree, dict[str, Any]]:
  """Restores the parameters of the teacher `config.teacher` of a student's run.

  `workdir` is the workdir of the student's run, which does not have to exist yet.

  Returns:
    The parameters of the teacher, and the record for `save_teacher_record`: a dict of its `step`
    and `config`.

  Raises:
    WorkdirError: there is no teacher, or it is not the run that this student learned from.
    ConfigError: the model of the teacher differs from the model of the student.
    CheckpointError: the teacher has no usable checkpoint.
  """
  teacher_workdir = layout.absolute(config.teacher)
  try:
    saved = layout.read_config(teacher_workdir)
  except errors.UserError as error:
    raise type(error)(f'{error}; name the run of the teacher: --config.teacher=RUN') from None
  if found := layout.differences(config, saved, _SHARED_SETTINGS):
    raise errors.ConfigError(
      f'the teacher {teacher_workdir} has another model than the student ({"; ".join(found)});'
      ' use the same settings for both'
    )
  teacher = config_lib.from_config_dict(saved)
  file = layout.absolute(workdir) / _TEACHER_FILE
  record = layout.read_json(file, _is_record) if file.exists() else {}
  if record and (found := layout.differences(teacher, record['config'])):
    raise errors.WorkdirError(
      f'the teacher {teacher_workdir} is not the run that this student learned from'
      f' ({"; ".join(found)}); name that run: --config.teacher=RUN'
    )
  params, step = restore_params(teacher, teacher_workdir, record.get('step'))
  return params, {'step': step, 'config': saved}


def save_teacher_record(workdir: epath.Path, record: dict[str, Any]) -> None:
  """Records the teacher of a student's run in its workdir."""
  layout.write_atomically(workdir / _TEACHER_FILE, json.dumps(record, indent=2) + '\n')


def restore_params(
  config: config_lib.Config, workdir: epath.Path, step: int | None = None, student: bool = False
) -> tuple[PyTree, int]:
  """Restores the parameters that are evaluated, and their step; by default the newest valid one.

  The checkpoints of a student's run contain only the parameters of the student.
  """
  init_params = functools.partial(farmer.init_params, model=farmer.build(config))
  shapes = jax.eval_shape(init_params, jax.random.key(0))
  if student:
    shapes = {'student': shapes['flow']}  # A student has the architecture of the flow.
  return checkpoints.restore_params(workdir, config.train.evaluated_params, shapes, step)


def _is_record(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and isinstance(value.get('config'), dict)
    and type(value.get('step')) is int
  )
