"""`--job=distill`: teaches a student to undo the flow of a trained run in one pass a block."""

import dataclasses
import functools

import jax
import numpy as np

from farmer_jax import api, losses, sampling, terminal
from farmer_jax.evaluation import figures, reconstruction, sampling_figures
from farmer_jax.jobs import training
from farmer_jax.nn import farmer
from farmer_jax.workdir import layout


def run(config, workdir):
  """Distils, validates, draws samples by the student; prints how close and how fast it is."""
  config = dataclasses.replace(
    config,
    teacher=str(layout.absolute(config.teacher)),
    sampling=dataclasses.replace(config.sampling, inverse='student'),
  )
  data = training.load_data(config)
  mesh = training.make_mesh(config)
  model = farmer.build(config)
  teacher, record = api.load_teacher(config, workdir, model)
  teacher = mesh.place(farmer.with_names(teacher, model))
  workdir = training.claim(config, workdir, data)
  if not jax.process_index():
    api.keep_teacher(workdir, record)
  settings = config.distill

  def complete(params):
    return teacher | {'student': params['student']}

  state, valid, examples = training.train(
    config,
    workdir,
    data,
    mesh,
    model=model,
    evaluator=reconstruction.ReconstructionEvaluator(model, config, teacher),
    complete=complete,
    init_params=functools.partial(losses.init_student, model=model, objective=settings.objective),
    loss_fn=functools.partial(losses.distillation_loss, model=model, config=config),
    constants={'teacher': teacher},
  )
  params = complete(state.best_params)
  _report(config, workdir, model, params, valid, examples, data.train.class_names)


def _report(config, workdir, model, params, valid, examples, class_names):
  """The closing lines, and a picture of what the student makes of drawn latents."""
  if valid:
    terminal.tell(
      f'Held-out reconstruction ({examples} images): {valid["psnr"]:.2f} dB, root mean square error'
      f' {valid["rmse"]:.4f} (pixels in [-1, 1])'
    )
  labels = sampling.grid_labels(config)
  batch = np.resize(labels[:, 0], config.sampling.batch_size)
  z = sampling.Sampler(model, config).latents(params, batch, np.arange(len(batch)))
  found = sampling.compare_student(model, config, params, jax.block_until_ready(z), batch)
  terminal.tell(
    f'Samples against the exact inverse: {found["psnr"]:.2f} dB; {found["ms_per_image"]:.2f} ms an'
    f' image in place of {found["sequential_ms_per_image"]:.2f} ({found["speedup"]:.1f} times'
    f' faster), in batches of {len(batch)}'
  )
  names = [class_names[label] for label in labels[:, 0]] if class_names else ()
  path = workdir / 'figures' / 'student.png'
  picture = sampling_figures.student(model, config, params, labels[:, 0], names)
  if not jax.process_index():
    figures.save_png(path, picture)
  terminal.tell(f'Exact, student, difference: {path}')
