"""`--job=sample`: draws images from a trained run."""

from collections.abc import Sequence
from typing import Any

import einops
import jax
import numpy as np
from etils import epath

from farmer_jax import api, sampling, terminal
from farmer_jax import config as config_lib
from farmer_jax.distributed import processes
from farmer_jax.evaluation import figures, sampling_figures
from farmer_jax.sampling import to_disk
from farmer_jax.workdir import layout, results
from farmer_jax.xla import host

REPORT_FILE = 'samples.json'


def run(config: config_lib.Config, workdir: epath.PathLike) -> epath.Path:
  """Draws `config.sampling.count` images into WORKDIR/samples/<step and settings>/.

  The job resumes where an earlier job stopped. All processes draw. Process 0 writes the report.

  Returns:
    The folder of the samples.
  """
  trained = api.Run(workdir, config)
  workdir = layout.results_folder(config, trained.workdir)
  config = config.with_sampling(densities=config.computes_densities)
  names, num_classes = trained.class_names, config.data.num_classes
  host.enable_compilation_cache(workdir)
  labels = sampling.parse_labels(config, names)
  model = sampling.in_sampling_dtype(trained.model, config.sampling)
  params, step = trained.params, trained.step
  folder = workdir / 'samples' / to_disk.folder_name(config.sampling, step)
  with trained.activate():
    of_run = model, params, step, labels, trained.mesh
    plan = sampling.cached_measurement(config, workdir, *of_run)
    sampler = sampling.Sampler(model, config, plan.get('chunk_sizes'))
    seconds = to_disk.draw_missing(sampler, params, labels, config.sampling, folder, trained.mesh)
  processes.barrier('samples')
  if jax.process_index():
    return folder
  with trained.activate():
    pools = sampling.measure_pools(sampler, params, labels, config.sampling, trained.mesh)
  measured = dict(inverse=plan, seconds_per_image=seconds, guidance_pools=pools)
  report = to_disk.summarize(folder, config.sampling, checkpoint_step=step, **measured)
  layout.write_json(folder / REPORT_FILE, report)
  label_names = [sampling.label_name(label, num_classes, names) for label in labels]
  _save_images(config.sampling, folder, label_names)
  if config.sampling.figures:
    rows = config.sampling.grid_rows
    drawn = sampling_figures.SamplingFigures(
      model, config, params, labels[:rows], label_names[:rows], plan.get('chunk_sizes')
    )
    with trained.activate():
      pictures = drawn.draw_supported()
    if config.model.flow.blocks and config.sampling.densities:
      pictures |= _draw_by_log_det(config.sampling, folder)
    for name, picture in pictures.items():
      file = workdir / 'figures' / f'{name}.png'
      figures.save_png(file, picture)
      terminal.print_result(f'Figure: {file}')
  _print_report(report, folder)
  return folder


def _save_images(
  settings: config_lib.Sampling, folder: epath.Path, label_names: Sequence[str]
) -> None:
  """Saves a grid of the first images and, with `settings.png`, a PNG file of each image.

  Each row of the grid shows one label if there are several labels and all of them fit.
  """
  store, num_labels = to_disk.open_results(folder, settings), len(label_names)
  one_label_a_row = 1 < num_labels <= min(settings.grid_rows, settings.count)
  rows = num_labels if one_label_a_row else min(settings.grid_rows, settings.count)
  columns = min(settings.grid_columns, settings.count // rows)
  # Image i has the label at index i % num_labels.
  order = '(columns rows)' if one_label_a_row else '(rows columns)'
  images = store.read('images', rows * columns)
  grid = einops.rearrange(images, f'{order} ... -> rows columns ...', rows=rows)
  names = label_names if one_label_a_row else ()
  figures.save_png(folder / 'grid.png', figures.sample_grid(grid, names))
  if settings.png:
    for start in range(0, settings.count, results.ROWS_PER_FILE):
      end = min(start + results.ROWS_PER_FILE, settings.count)
      for number, image in enumerate(store.read('images', end, start), start):
        figures.save_png(folder / 'png' / f'{number:06d}.png', figures.as_rgb(image))


def _draw_by_log_det(
  settings: config_lib.Sampling, folder: epath.Path
) -> dict[str, figures.Picture]:
  """Draws the figure `log_det` of the samples, unless no sample has a log-determinant."""
  store = to_disk.open_results(folder, settings)
  names, rows = sampling_figures.by_log_det(store.read('log_det', settings.count))
  if not names:
    return {}
  # The images of all files may not fit in memory.
  images = [[store.read('images', i + 1, i)[0] for i in row] for row in rows]
  return {'log_det': figures.sample_grid(np.array(images), names)}


def _print_report(report: dict[str, Any], folder: epath.Path) -> None:
  terminal.print_result(f'{report["count"]} images: {folder}/*.npz, {folder / "grid.png"}')
  terminal.print_result(f'Images that are not finite: {report["nonfinite_samples"]}')
  if report['densities'] and (loss := report['densities'].get('loss')):
    terminal.print_result(
      f'Negative log-likelihood of the samples: {loss["mean"]:.4f} nats/dim, standard deviation'
      f' {loss["std"]:.4f}'
    )
  if seconds := report['seconds_per_image']:
    names = {'prior': 'the prior', 'inverse': 'the inverse of the flow', 'densities': 'densities'}
    parts = [f'{1e3 * value:.2f} ms for {names[name]}' for name, value in seconds.items()]
    terminal.print_result(f'Time per image: {", ".join(parts)}')
