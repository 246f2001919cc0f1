"""`--job=likelihood`: computes the likelihood of each image of a split."""

import jax
from etils import epath

from farmer_jax import api, terminal
from farmer_jax import config as config_lib
from farmer_jax.evaluation import figures, likelihood_summary, scoring
from farmer_jax.workdir import layout
from farmer_jax.xla import host

# Settings that do not change the scores, or that the prefix of the file name contains.
_NOT_IN_NAME = {'name', 'source', 'split', 'batch_size'}


def run(config: config_lib.Config, workdir: epath.PathLike) -> None:
  """Scores the images. Writes WORKDIR/likelihood/<name>.json and .csv, and figures."""
  model_run, settings = api.Run(workdir, config), config.likelihood
  workdir = layout.results_folder(config, model_run.workdir)
  host.enable_compilation_cache(workdir)
  source, ood_source = scoring.load_sources(config, model_run.class_names)
  scorer = scoring.Scoring(config, workdir, *model_run.density, model_run.mesh)
  rows = scorer.score(source, 'images')
  ood_rows = None if ood_source is None else scorer.score(ood_source, 'out-of-distribution images')
  if jax.process_index():
    return
  class_names = model_run.class_names or tuple(map(str, range(config.data.num_classes)))
  report = scorer.description() | likelihood_summary.summarize(rows, class_names)
  pictures = likelihood_summary.draw_figures(rows, source, class_names, report['unit'])
  tables, source_name = {'': rows}, settings.source or config.data.source
  if ood_rows is not None:
    detections = likelihood_summary.detect_ood(rows, ood_rows, source[0]['image'].size)
    names = source_name, str(settings.ood_source)
    report['ood'] = {
      'source': names[1],
      'auroc': {name: detection.auroc for name, detection in detections.items()},
      **likelihood_summary.summarize(ood_rows),
    }
    tables['-ood'] = ood_rows
    pictures['ood'] = likelihood_summary.draw_detections(detections, names)
  prefix = f'{source_name}-{settings.split}'
  path = config.data.path
  if settings.source is settings.path is None and path != model_run.trained_config.data.path:
    prefix += f'-data.path={path}'
  name = settings.name or layout.results_name(prefix, settings, _NOT_IN_NAME)
  folder = workdir / 'likelihood'
  for suffix, table in tables.items():
    layout.write_text(folder / f'{name}{suffix}.csv', likelihood_summary.to_csv(table))
  for kind, picture in pictures.items():
    figures.save_png(workdir / 'figures' / f'likelihood-{name}-{kind}.png', picture)
  # The JSON file is written last. If it exists, the job is complete.
  layout.write_json(folder / f'{name}.json', report)
  terminal.print_result(likelihood_summary.to_text(report))
  terminal.print_result(
    f'{folder / name}.json, .csv; {workdir / "figures" / f"likelihood-{name}"}-*.png'
  )
