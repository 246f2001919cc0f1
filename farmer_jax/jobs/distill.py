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
from farmer_jax.distributed import processes
from farmer_jax.evaluation import classifier, figures, sampling_figures, validation
from farmer_jax.jobs import training_job, training_run
from farmer_jax.nn import student
from farmer_jax.workdir import layout
from farmer_jax.xla import memory


def run(config: config_lib.Config, workdir: epath.PathLike) -> None:
  """Trains, validates and draws samples. Prints the accuracy and the speed of the student."""
  config = dataclasses.replace(config, teacher=str(layout.absolute(config.teacher)))
  config = training_run.with_extensions(config.with_sampling(inverse='student'), workdir)
  class_names = layout.read_class_names(layout.absolute(config.teacher))
  resources = training_run.Resources.load(config, class_names)
  model = student.build(config)
  teacher, record = teacher_lib.restore_teacher(config, workdir, resources.mesh)
  workdir = training_run.prepare_workdir(config, workdir, resources)
  if not jax.process_index():
    layout.write_json(workdir / teacher_lib.RECORD_FILE, record)

  def sampling_params(params: dict[str, Any]) -> dict[str, Any]:
    return teacher | {'student': params['student']}

  frozen: tuple[dict[str, Any], ...] = (teacher,)
  loss_fn = functools.partial(losses.distillation_loss, model=model, config=config)
  if config.distill.perceptual_weight:
    network = classifier.Classifier(config.data.num_classes)
    frozen += (_feature_params(config, workdir, resources),)
    loss_fn = functools.partial(
      loss_fn, features=functools.partial(network.apply, method='hidden_layers')
    )
  evaluator = validation.ReconstructionEvaluator(model, config, teacher)
  state, metrics = training_job.train(
    config,
    workdir,
    resources,
    model,
    evaluator,
    init_params=functools.partial(losses.init_student, model=model),
    loss_fn=loss_fn,
    sampling_params=sampling_params,
    frozen=frozen,
  )
  for suffix, target in (('', ''), ('_noise_free', ', compared with images without noise')):
    if f'psnr{suffix}' in metrics:
      terminal.print_result(
        f'Held-out reconstruction ({resources.num_validated(config)} images{target}):'
        f' PSNR {metrics[f"psnr{suffix}"]:.2f} dB, root mean square error'
        f' {metrics[f"rmse{suffix}"]:.4f} (pixels in [-1, 1])'
      )
  own, copied = (
    sum(a.size for a in jax.tree.leaves(p)) for p in (state.params['student'], teacher['flow'])
  )
  terminal.print_result(f"Parameters: {own:,} of the student, {copied:,} of the teacher's flow")
  params = sampling_params(state.evaluation_params)
  with memory.explained(config, 'sampling'), resources.mesh.activate():
    _compare_with_exact_inverse(config, workdir, model, params, resources.train.class_names)


def _feature_params(
  config: config_lib.Config, workdir: epath.Path, resources: training_run.Resources
) -> dict[str, Any]:
  """Returns the parameters of the classifier on the mesh. Process 0 trains it, if necessary."""
  arguments = config.data, resources.train, workdir / 'fidelity'
  processes.on_process_zero(lambda: classifier.load_or_train(*arguments))
  params = jax.tree.map(np.asarray, classifier.load_or_train(*arguments))
  return jax.device_put({'params': params}, resources.mesh.replicated)


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
