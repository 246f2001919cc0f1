"""Likelihood evaluation of a run: bounds, classification and out-of-distribution detection.

    python -m benchmarks.likelihood --run=RUN --ood=digits --ood=synthetic

RUN is a class-conditional run with uniform dequantization. The likelihood jobs write their reports
to RUN/likelihood. Prints Markdown tables.
"""

import dataclasses
import itertools
import json
from typing import Any

from absl import app, flags

from benchmarks import timing
from farmer_jax import config as config_lib
from farmer_jax import jobs
from farmer_jax.workdir import layout

_RUN = flags.DEFINE_string('run', None, 'Workdir of a trained run.', required=True)
_OOD = flags.DEFINE_multi_string(
  'ood', ['digits', 'synthetic'], 'Out-of-distribution datasets, as in --config.data.source.'
)
_EXAMPLES = flags.DEFINE_integer('examples', None, 'Images per row. None scores all images.')
_MARGINAL_EXAMPLES = flags.DEFINE_integer(
  'marginal_examples',
  None,
  'Images per row with condition=marginal and several draws, which is slow. None scores all'
  ' images.',
)
_DRAWS = flags.DEFINE_list('draws', ['1', '16'], 'Noise draws per image.')

Row = dict[str, object]


def run_job(name: str, **settings: Any) -> dict[str, Any]:
  """Runs a likelihood job on the run and returns its report."""
  run = layout.absolute(_RUN.value)
  config = config_lib.from_config_dict(layout.read_config(run))
  likelihood = config_lib.Likelihood(name=name, **settings)
  config = dataclasses.replace(config, job='likelihood', likelihood=likelihood)
  config_lib.check(config)
  jobs.run(config, run)
  return json.loads((run / 'likelihood' / f'{name}.json').read_text())


def bounds_and_accuracies() -> tuple[list[Row], list[Row]]:
  """Returns the rows of the tables of bounds and of classification accuracies."""
  bounds, accuracies = [], []
  for condition in ('label', 'none', 'marginal'):
    for draws in (1,) if condition == 'none' else map(int, _DRAWS.value):
      slow = condition == 'marginal' and draws > 1
      examples = _MARGINAL_EXAMPLES.value if slow else _EXAMPLES.value
      settings = dict(condition=condition, draws=draws, examples=examples)
      report = run_job(f'{condition}-{draws}', **settings)
      weighted = report.get('bits_per_dim_importance', report['bits_per_dim'])
      row = {'condition': condition, 'draws': draws, 'images': report['count']}
      bound = f'{weighted["mean"]:.4f} ± {weighted["standard_error"]:.4f}'
      mean = f'{report["bits_per_dim"]["mean"]:.4f}'
      bounds.append(row | {'bits/dim, mean': mean, 'bits/dim, importance-weighted': bound})
      if 'accuracy' in report:
        accuracies.append(row | {'classification accuracy': f'{report["accuracy"]:.4f}'})
  return bounds, accuracies


def ood_detection(source: str, split: str) -> Row:
  """Returns a row of the table of out-of-distribution detection."""
  settings = dict(condition='none', split=split, ood_source=source, examples=10_000)
  report = run_job(f'{split}-{source}', **settings)['ood']
  return {
    'split': split,
    'OOD dataset': source,
    'images': report['count'],
    'bits/dim of OOD images': f'{report["bits_per_dim"]["mean"]:.3f}',
    'AUROC, log p': f'{report["auroc"]["log_density"]:.4f}',
    'AUROC, log p + PNG length': f'{report["auroc"]["complexity_corrected"]:.4f}',
  }


def main(argv: list[str]) -> None:
  """Runs the jobs and prints the tables."""
  del argv
  detections = [ood_detection(*pair) for pair in itertools.product(_OOD.value, ('valid', 'train'))]
  for rows in (*bounds_and_accuracies(), detections):
    print()
    timing.print_table(rows)


if __name__ == '__main__':
  app.run(main)
