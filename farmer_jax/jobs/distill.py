"""`--job=distill`: trains a student to invert the flow of a trained run in one pass per block."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax import losses, sampling, terminal
from farmer_jax import teacher as teacher_lib
from farmer_jax.evaluation import figures, sampling_figures, validation
from farmer_jax.jobs import training_job, training_run
from farmer_jax.nn import student
from farmer_jax.workdir import layout
from farmer_jax.xla import memory


def run(config: config_lib.Config, workdir: epath.PathLike) -> None:
  """Trains, validates and draws samples. Prints the accuracy and the speed of the student."""
  config = dataclasses.replace(config, teacher=str(layout.absolute(config.teacher)))
  config = config.with_sampling(inverse='student')
  class_names = layout.read_class_names(layout.absolute(config.teacher))
  resources = training_run.Resources.load(config, class_names)
  model = student.build(config)
  teacher, record = teacher_lib.restore_teacher(config, workdir, resources.mesh)
  workdir = training_run.prepare_workdir(config, workdir, resources)
  if not jax.process_index():
    layout.write_json(workdir / teacher_lib.RECORD_FILE, record)

  def sampling_params(params: dict[str, Any]) -> dict[str, Any]:
    return teacher | {'student': params['student']}

  evaluator = validation.ReconstructionEvaluator(model, config, teacher)
  state, metrics = training_job.train(
    config,
    workdir,
    resources,
    model,
    evaluator,
    init_params=functools.partial(
      losses.init_student, model=model, objective=config.distill.objective
    ),
    loss_fn=functools.partial(losses.distillation_loss, model=model, config=config),
    sampling_params=sampling_params,
    frozen=(teacher,),
  )
  if metrics:
    terminal.print_result(
      f'Held-out reconstruction ({resources.num_validated(config)} images):'
      f' PSNR {metrics["psnr"]:.2f} dB, root mean square error'
      f' {metrics["rmse"]:.4f} (pixels in [-1, 1])'
    )
  params = sampling_params(state.evaluation_params)
  with memory.explained(config, 'sampling'), resources.mesh.activate():
    _compare_with_exact_inverse(config, workdir, model, params, resources.train.class_names)


def _compare_with_exact_inverse(
  config: config_lib.Config,
  workdir: epath.Path,
  model: student.StudentFarmer,
  params: dict[str, Any],
  class_names: tuple[str, ...],
) -> None:
  """Prints the accuracy and the speed of the student on sampled latents, and saves a figure."""
  labels = sampling.grid_labels(config)[:, 0]
  batch = np.resize(labels, config.sampling.batch_size)
  z = sampling.Sampler(model, config).latents(params, batch, np.arange(len(batch)))
  found = sampling.compare_student(model, config, params, jax.block_until_ready(z), batch)
  terminal.print_result(
    f'Student compared with the exact inverse: PSNR {found["psnr"]:.2f} dB;'
    f' {found["ms_per_image"]:.2f} ms per image instead of {found["sequential_ms_per_image"]:.2f}'
    f' ms ({found["speedup"]:.1f} times faster), in batches of {len(batch)}'
  )
  names = [class_names[label] for label in labels] if class_names else ()
  drawn = sampling_figures.SamplingFigures(model, config, params, labels.tolist(), names)
  picture = drawn.student_comparison()
  path = workdir / 'figures' / 'student.png'
  if not jax.process_index():
    figures.save_png(path, picture)
  terminal.print_result(f'Figure of the exact inverse, the student and their difference: {path}')
