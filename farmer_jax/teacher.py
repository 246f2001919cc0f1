"""The teacher of a distillation run: another run, whose flow the student learns to invert.

A distillation run records the configuration and the checkpoint step of its teacher in
WORKDIR/teacher.json. After a restart, and in every later job, the parameters of the teacher come
from this checkpoint.
"""

import functools
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from farmer_jax import checkpoints, errors, exports
from farmer_jax import config as config_lib
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.nn import farmer
from farmer_jax.nn import student as student_lib
from farmer_jax.workdir import layout
from farmer_jax.xla import memory

RECORD_FILE = 'teacher.json'

# Key prefixes of the settings that a student and its teacher must share.
_SHARED_SETTINGS = (
  *('model.patch_size', 'model.patch_basis', 'model.label_dropout', 'model.flow.', 'model.prior.'),
  *('model.mlp', 'model.qk_norm', 'model.neighborhood', 'noise.kind', 'noise.std_end'),
  *('data.image_size', 'data.channels', 'data.num_classes'),
)


def restore_teacher(
  config: config_lib.Config, workdir: epath.PathLike, mesh: mesh_lib.Mesh
) -> tuple[PyTree, dict[str, Any]]:
  """Restores the parameters of the teacher `config.teacher` of a distillation run onto a mesh.

  `workdir` is the workdir of the distillation run. It can be missing.

  Returns:
    The parameters of the teacher, and the record for `RECORD_FILE`: its `step` and its `config`.

  Raises:
    WorkdirError: `config.teacher` is not a run, or not the recorded teacher.
    ConfigError: the teacher and the student have different settings of the model or of the data.
    CheckpointError: the checkpoint of the teacher is missing or corrupt.
  """
  if export := layout.read_export(workdir):  # It contains the teacher.
    params, _ = restore_params(config, layout.absolute(workdir), mesh)
    return params, {'step': export['teacher_step'], 'config': export['config']}
  teacher_workdir = layout.absolute(config.teacher)
  try:
    saved = layout.read_config(teacher_workdir)
  except errors.UserError as error:
    raise type(error)(f'{error}; name the workdir of the teacher: --config.teacher=RUN') from None
  if found := layout.differences(config, saved, _SHARED_SETTINGS):
    raise errors.ConfigError(
      f'the teacher {teacher_workdir} and the student have different settings'
      f' ({"; ".join(found)}); use the settings of the teacher'
    )
  teacher = config_lib.from_config_dict(saved)
  file = layout.absolute(workdir) / RECORD_FILE
  record = layout.read_json(file, _is_record) if file.exists() else {}
  # The teacher may have been extended since. Its recorded checkpoint stays the same.
  ignored = layout.EXTENSION_KEYS
  if record and (found := layout.differences(teacher, record['config'], ignored=ignored)):
    raise errors.WorkdirError(
      f'the teacher {teacher_workdir} is not the run from which this student learned'
      f' ({"; ".join(found)}); name that run: --config.teacher=RUN'
    )
  params, step = restore_params(teacher, teacher_workdir, mesh, record.get('step'))
  return params, {'step': step, 'config': saved}


def restore_params(
  config: config_lib.Config,
  workdir: epath.Path,
  mesh: mesh_lib.Mesh,
  step: int | None = None,
  student: bool = False,
) -> tuple[PyTree, int]:
  """Restores the parameters for evaluation, sharded as in training, onto a mesh.

  By default, restores the newest valid checkpoint. Also returns its step. With `student`, restores
  the parameters of the student, which are the only parameters in checkpoints of a distillation run.
  An export has one step.
  """
  module: Any = student_lib if student else farmer
  init_params = functools.partial(module.init_boxed_params, model=module.build(config))
  shapes = jax.eval_shape(init_params, jax.random.key(0))
  shapes, name = mesh.abstract(shapes), config.train.evaluated_params
  check_step(workdir, step)
  with memory.attributed(functools.partial(memory.of_arrays, 'parameters per device', shapes)):
    if export := layout.read_export(workdir):
      return exports.restore_params(workdir, shapes), export['step']
    return checkpoints.restore_params(workdir, name, shapes, step)


def check_step(workdir: epath.Path, step: int | None) -> None:
  """Raises CheckpointError if a run or an export has no parameters of `step`, unless it is None."""
  if step is None:
    return
  if export := layout.read_export(workdir):
    if step != export['step']:
      raise errors.CheckpointError(f'the export {workdir} is of step {export["step"]}, not {step}')
  else:
    checkpoints.check_step(workdir, step)


def _is_record(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and isinstance(value.get('config'), dict)
    and type(value.get('step')) is int
  )
