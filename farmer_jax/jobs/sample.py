"""`--job=sample`: draws images from a trained run."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable

import jax
import numpy as np

from farmer_jax import api, errors, sampling, terminal
from farmer_jax.distributed import mesh, processes
from farmer_jax.evaluation import figures, sampling_figures
from farmer_jax.nn import farmer
from farmer_jax.workdir import layout, results
from farmer_jax.xla import host

# Settings that say how many images are wanted and what is made of them, not what image i is.
_NOT_IN_NAME = {'count', 'batch_size', 'png', 'figures', 'per_class', 'max_classes'}

# What is kept of each image, and its name in the npz files: evaluators look for images, uint8
# [n, H, W, C], under arr_0 and for labels under arr_1.
ARRAYS = {'images': 'arr_0', 'labels': 'arr_1', 'residual': 'residual', 'finite': 'finite'}

REPORT_FILE = 'samples.json'


def run(config, workdir):
  """Draws `config.sampling.count` images into WORKDIR/samples/<step and settings>/; returns that
  folder. Several processes divide the images among them, a thousand at a time."""
  workdir = layout.open_run(config, workdir)
  host.cache_compilations(workdir)
  class_names = layout.read_class_names(workdir)
  labels = parse_labels(config, class_names)
  model = sampling.in_sampling_dtype(farmer.build(config), config.sampling)
  params, step = api.load_params(config, workdir, model)
  folder = workdir / 'samples' / folder_name(config.sampling, step)
  plan = _inverse_plan(config, workdir, model, params, step, labels)
  chunks = plan.get('chunks')
  seconds = _draw_missing(config, folder, sampling.Sampler(model, config, chunks), params, labels)
  processes.wait_for_all('samples')
  if jax.process_index():
    return folder
  store = results.Shards(folder, ARRAYS)
  names = [_label_name(label, class_names, config.data.num_classes) for label in labels]
  report = _report(config, store, step, plan, seconds)
  layout.write_atomically(folder / REPORT_FILE, json.dumps(report, indent=2) + '\n')
  _save_pictures(config, store, folder, names)
  if config.sampling.figures:
    _save_figures(config, workdir, model, params, labels, names, chunks)
  _print_report(report, folder)
  return folder


def parse_labels(config, class_names):
  """The classes that `config.sampling.labels` names, a list of ints; the images take them in
  turn."""
  classes = config.data.num_classes
  if not config.sampling.labels:
    return list(range(classes)) or [0]
  labels = []
  for word in config.sampling.labels.split(','):
    word = word.strip()
    if word == 'none' or not classes:
      labels.append(classes)
    elif word in class_names:
      labels.append(class_names.index(word))
    elif word.isdecimal() and int(word) < classes:
      labels.append(int(word))
    else:
      known = f' or one of {", ".join(class_names[:20])}' if class_names else ''
      raise errors.ConfigError(
        f'config.sampling.labels has no class {word!r}; a class is a number from 0 to'
        f' {classes - 1}{known}, or none'
      )
  return labels


def _label_name(label, class_names, classes):
  if label == classes:
    return ''
  return class_names[label] if class_names else str(label)


def folder_name(settings, step):
  """A name for the samples of a checkpoint: the settings that differ from the defaults."""
  return layout.results_name(step, settings, _NOT_IN_NAME)


def _inverse_plan(config, workdir, model, params, step, labels):
  """How the flow is inverted, and how close and how fast that is; measured on a batch, or as
  measured before for this run."""
  settings = config.sampling
  if settings.inverse == 'sequential' or not config.model.flow.blocks:
    return {'chunks': [1] * config.model.flow.blocks, 'difference': 0.0}
  details = {
    'chunked': f' {settings.chunk}',
    'student': f', {settings.refinement_rounds} rounds of refinement',
  }
  key = (
    f'{settings.inverse}{details.get(settings.inverse, "")}, tolerance {settings.tolerance:g},'
    f' step {step}, batch of {settings.batch_size}, {jax.devices()[0].device_kind}'
  )
  file = workdir / 'inverse_plan.json'
  plans = layout.read_json(file, _are_plans) if file.exists() else {}
  if key not in plans and not jax.process_index():  # measures for all
    terminal.say('Measuring the inverse of the flow ...')
    batch = _batch_labels(labels, np.arange(settings.batch_size))
    sampler = sampling.Sampler(model, config)
    z = sampler.latents(params, batch, np.arange(settings.batch_size))
    measure = sampling.compare_student if settings.inverse == 'student' else sampling.plan_inverse
    plans[key] = measure(model, config, params, z, batch)
    layout.write_atomically(file, json.dumps(plans, indent=2) + '\n')
  processes.wait_for_all('plan')
  plan = json.loads(file.read_text())[key]
  _tell_plan(plan, settings)
  return plan


def _are_plans(value):
  return isinstance(value, dict) and all(isinstance(plan, dict) for plan in value.values())


def _tell_plan(plan, settings):
  if settings.inverse == 'student':
    terminal.say(
      f'The student is {plan["speedup"]:.1f} times faster than the sequential inverse;'
      f' {plan["psnr"]:.1f} dB between their images.'
    )
  else:
    terminal.say(f'Tokens found together in the inverse, by block: {plan["chunks"]}')
  if plan['difference'] > settings.tolerance:
    terminal.say(
      'Images differ from those of the sequential inverse by up to'
      f' {plan["difference"]:.1e}, relative to 1 + |x|: more than'
      f' config.sampling.tolerance={settings.tolerance:g}.'
    )


def _batch_labels(labels, numbers):
  return np.asarray(labels, np.int32)[numbers % len(labels)]


def _draw_missing(config, folder, sampler, params, labels):
  """Draws what is missing of this process's share; returns seconds an image for the prior and for
  the inverse, without compilation, or None if nothing was left to time."""
  settings, size_of_shard = config.sampling, results.SHARD_SIZE
  files = -(-settings.count // size_of_shard)
  process, processes = jax.process_index(), jax.process_count()
  file, next_file = files * process // processes, files * (process + 1) // processes
  origin, end = file * size_of_shard, min(next_file * size_of_shard, settings.count)
  if origin >= end:
    return None
  store = results.Shards(folder, ARRAYS, file)
  start = min(origin + len(store), end)
  terminal.say(f'{start - origin} of {end - origin} images are in {folder}')
  devices = mesh.LocalDevices()
  params, size, times = devices.replicate(params), devices.batch_size(settings.batch_size), []
  with terminal.progress('sampling', 'image', end - origin, start - origin) as bar:
    # Batches begin where they did before, so that a job that goes on repeats the same arithmetic.
    for first in range(start - start % size, end, size):
      numbers = np.arange(first, first + size)
      batch = _batch_labels(labels, numbers)
      on_devices = devices.split((batch, numbers.astype(np.int32)))
      began = time.perf_counter()
      z = jax.block_until_ready(sampler.latents(params, *on_devices))
      between = time.perf_counter()
      samples = jax.block_until_ready(sampler.images(params, z, on_devices[0]))
      times.append((between - began, time.perf_counter() - between))
      wanted = (numbers >= start) & (numbers < end)
      samples = jax.device_get((samples.images, samples.finite, samples.residual))
      images, finite, residual = (array[wanted] for array in samples)
      store.append(images=images, labels=batch[wanted], finite=finite, residual=residual)
      bar.update(int(wanted.sum()))
    store.flush()
  if len(times) < 2:
    return None
  prior, inverse = np.median(times[1:], axis=0) / size
  return {'prior': prior, 'inverse': inverse}


def _report(config, store, step, plan, seconds):
  """What samples.json says."""
  count = config.sampling.count
  broken = np.flatnonzero(~store.read('finite', count))
  residuals = store.read('residual', count)
  residuals = residuals[~np.isnan(residuals)]  # a student that is not refined leaves none
  return {
    'count': count,
    'checkpoint_step': step,
    'nonfinite_samples': len(broken),
    'nonfinite_numbers': broken[:100].tolist(),
    'largest_residual': float(residuals.max()) if len(residuals) else None,
    'inverse': plan,
    'seconds_per_image': seconds,
    'sampling': dataclasses.asdict(config.sampling),
  }


def _save_pictures(config, store, folder, names):
  """The grid, a row a class where classes are few, and single PNGs."""
  settings = config.sampling
  rows = len(names) if 1 < len(names) <= settings.max_classes else settings.max_classes
  columns = min(settings.per_class, max(1, settings.count // rows))
  rows = min(rows, settings.count)
  images = store.read('images', rows * columns)
  by_class = len(names) == rows
  grid = images.reshape(columns, rows, *images.shape[1:]).swapaxes(0, 1)
  if not by_class:
    grid = images.reshape(rows, columns, *images.shape[1:])
  figures.save_png(folder / 'grid.png', figures.sample_grid(grid, names if by_class else ()))
  if settings.png:
    for start in range(0, settings.count, results.SHARD_SIZE):
      end = min(start + results.SHARD_SIZE, settings.count)
      for number, image in enumerate(store.read('images', end, start), start):
        figures.save_png(folder / 'png' / f'{number:06d}.png', figures.as_rgb(image))


def _save_figures(config, workdir, model, params, labels, names, chunks):
  """Sweeps over the controls of sampling, and the path through the flow."""
  rows = config.sampling.max_classes
  labels, names = labels[:rows], names[:rows]
  pictures: dict[str, Callable] = {}
  if (
    config.model.prior.kind == 'mixture' and config.data.num_classes and config.model.label_dropout
  ):
    pictures['guidance'] = functools.partial(sampling_figures.guidance, chunks=chunks)
  if config.model.prior.kind == 'mixture' and config.model.prior.informative_channels:
    pictures['redundant'] = functools.partial(sampling_figures.redundant, chunks=chunks)
  if config.model.flow.blocks:
    pictures['denoising_path'] = sampling_figures.path
  if config.teacher is not None:
    pictures['student'] = sampling_figures.student
  for name, draw in pictures.items():
    path = workdir / 'figures' / f'{name}.png'
    figures.save_png(path, draw(model, config, params, labels, names))
    print(f'Figure:  {path}')


def _print_report(report, folder):
  print(f'{report["count"]} images: {folder}/*.npz, {folder / "grid.png"}')
  print(f'Not finite: {report["nonfinite_samples"]}')
  seconds = report['seconds_per_image']
  if seconds:
    print(
      f'Prior {seconds["prior"] * 1e3:.2f} ms, inverse {seconds["inverse"] * 1e3:.2f} ms an image.'
    )
