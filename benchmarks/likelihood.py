"""What a model says of images: bounds, conditions, its classes, and other data.

    python -m benchmarks.likelihood --run=RUN --other=digits --other=synthetic

RUN is a class-conditional run under uniform dequantisation. Prints tables in Markdown; the jobs
leave their reports in RUN/likelihood.
"""

import dataclasses
import json

from absl import app, flags, logging

from farmer_jax import config as config_lib
from farmer_jax import jobs
from farmer_jax.workdir import layout

_RUN = flags.DEFINE_string('run', None, 'Workdir of a trained run.', required=True)
_OTHER = flags.DEFINE_multi_string('other', ['digits', 'synthetic'], 'Sources to be told apart.')
_EXAMPLES = flags.DEFINE_integer('examples', None, 'Images of a line; all by default.')
_MARGINAL_EXAMPLES = flags.DEFINE_integer(
  'marginal_examples', None, 'The same with the class unknown and several draws, which takes long.'
)
_DRAWS = flags.DEFINE_list('draws', ['1', '16'], 'Draws of the noise.')


def report(name, **settings):
  """The report of a likelihood job on the run."""
  run = layout.absolute(_RUN.value)
  config = config_lib.from_config_dict(layout.read_config(run))
  likelihood = config_lib.Likelihood(name=name, **settings)
  config = dataclasses.replace(config, job='likelihood', likelihood=likelihood)
  config_lib.check(config)
  jobs.run(config, run)
  return json.loads((run / 'likelihood' / f'{name}.json').read_text())


def main(argv):
  """Runs the jobs; prints the tables."""
  del argv
  logging.set_verbosity(logging.WARNING)
  bounds, classes, others = [], [], []
  for condition in ('label', 'none', 'marginal'):
    for draws in (1,) if condition == 'none' else map(int, _DRAWS.value):
      fewer = condition == 'marginal' and draws > 1
      examples = _MARGINAL_EXAMPLES.value if fewer else _EXAMPLES.value
      name = f'{condition}-{draws}'
      found = report(name, condition=condition, draws=draws, examples=examples)
      weighted = found.get('bits_per_dim_importance', found['bits_per_dim'])
      bounds.append(
        f'| {condition} | {draws} | {found["count"]} | {found["bits_per_dim"]["mean"]:.4f} |'
        f' {weighted["mean"]:.4f} ± {weighted["standard_error"]:.4f} |'
      )
      if 'accuracy' in found:
        classes.append(f'| {draws} | {found["count"]} | {found["accuracy"]:.4f} |')
  for source in _OTHER.value:
    for split in ('valid', 'train'):
      found = report(
        f'{split}-{source}', condition='none', split=split, other_source=source, examples=10_000
      )['other']
      log_density, corrected = found['auroc'].values()
      bits = found['bits_per_dim']['mean']
      others.append(
        f'| {split} | {source} | {found["count"]} | {bits:.3f} | {log_density:.4f} |'
        f' {corrected:.4f} |'
      )
  for title, rows in (
    ('| condition | draws | images | bits/dim, average | importance-weighted |', bounds),
    ('| draws | images | accuracy of the likeliest class |', classes),
    ('| split | other | images | bits/dim of the other | AUROC, log p | with PNG length |', others),
  ):
    print(f'\n{title}\n{"| --- " * (title.count("|") - 1)}|')
    print('\n'.join(rows))


if __name__ == '__main__':
  app.run(main)
