"""`--job=fidelity`: measures the quality of samples by a comparison with real images."""

import dataclasses
import json
from typing import Any

import jax
from absl import logging
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax import terminal
from farmer_jax.errors import DataError
from farmer_jax.evaluation import feature_networks, image_sets
from farmer_jax.jobs import sample
from farmer_jax.workdir import layout
from farmer_jax.xla import host

# Settings that do not change the metrics, or that the prefix of the file name contains.
_NOT_IN_NAME = {'name', 'samples', 'count', 'weights', 'batch_size'}

# Below this number of images, Fréchet and kernel distances are not reliable.
_FEW_IMAGES = 1000


def run(config: config_lib.Config, workdir: epath.PathLike) -> None:
  """Compares samples with real images. Draws missing samples, unless the settings name samples.

  Writes WORKDIR/fidelity/<name>.json and prints the metrics.
  """
  workdir = layout.open_run(config, workdir)
  results = layout.results_folder(config, workdir)
  host.enable_compilation_cache(results)
  fidelity, folder = config.fidelity, results / 'fidelity'
  path = fidelity.samples
  if path is None and jax.process_count() > 1:
    path = _draw_samples(config, workdir)  # All processes draw. Process 0 compares.
  if jax.process_index():
    return
  network = feature_networks.load(config, folder, layout.read_class_names(workdir))
  reference, reference_name = feature_networks.load_reference(config, network, folder)
  if path is None:  # Errors in other settings are raised above, before the slow sampling.
    path = _draw_samples(config, workdir)
  samples = image_sets.from_path(path, config.data).first(fidelity.count)
  if len(samples) <= max(10, fidelity.neighbors):
    raise DataError(
      f'{path} has {len(samples)} images; --job=fidelity needs more than 10, and more than'
      f' --config.fidelity.neighbors={fidelity.neighbors}'
    )
  if len(samples) < _FEW_IMAGES:
    logging.warning(
      f'{path} has only {len(samples)} images. Distances of fewer than {_FEW_IMAGES} images are'
      ' dominated by chance.'
    )
  statistics = network.statistics(samples, 'samples', fidelity.pairwise_images)
  report: dict[str, Any] = {
    'samples': samples.name,
    'count': len(samples),
    'reference': reference_name,
    'network': network.name,
    **network.compare(statistics, reference, fidelity.neighbors, samples.labels),
  }
  name = samples.name
  if fidelity.samples is None:
    drawn = json.loads((layout.absolute(path) / sample.REPORT_FILE).read_text())
    report |= {key: drawn[key] for key in ('checkpoint_step', 'nonfinite_samples', 'sampling')}
  else:  # Different paths can end in the same name.
    name += f'-{layout.short_hash(layout.absolute(fidelity.samples))}'
  report['settings'] = dataclasses.asdict(fidelity)
  name = layout.results_name(f'{name}-{len(samples)}', fidelity, _NOT_IN_NAME)
  file = folder / f'{fidelity.name or name}.json'
  layout.write_json(file, report)
  terminal.print_result(_to_text(report))
  terminal.print_result(str(file))


def _draw_samples(config: config_lib.Config, workdir: epath.Path) -> epath.Path:
  """Draws the missing samples. Returns the folder of the samples."""
  config = config.with_sampling(count=config.fidelity.count, figures=False, png=False)
  return sample.run(config, workdir)


def _to_text(report: dict[str, Any]) -> str:
  lines = [
    f'Sample quality of {report["count"]} samples; reference: {report["reference"]}; features:'
    f' {report["network"]}'
  ]
  lines += [f'{name:36} {value:.4f}' for name, value in report.items() if isinstance(value, float)]
  if report.get('nonfinite_samples'):
    lines.append(f'Samples with values that are not finite: {report["nonfinite_samples"]}')
  return '\n'.join(lines)
