"""Guidance methods and scales: accuracy of a classifier on samples, and Fréchet distance.

    python -m benchmarks.guidance --run=RUN --count=5000

The classifier is trained on the training images of the run. The Fréchet distance compares its
features between samples and held-out images. Prints a Markdown table.
"""

from collections.abc import Iterator

import numpy as np
from absl import app, flags

from benchmarks import sample_quality, timing
from farmer_jax import api, sampling
from farmer_jax import config as config_lib
from farmer_jax.xla import host

_RUN = flags.DEFINE_string('run', None, 'Workdir of a trained run.', required=True)
_COUNT = flags.DEFINE_integer('count', 5000, 'Samples per row of the table.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 250, 'Samples drawn at once.')
_DENOISE = flags.DEFINE_bool(
  'denoise', None, 'Value of config.sampling.denoise. None uses the setting of the run.'
)
_SCALES = flags.DEFINE_list('scales', ['0.25', '0.5', '1', '2', '3', '4'], 'Guidance scales.')


def variants() -> Iterator[tuple[str, config_lib.Guidance]]:
  """Yields the name and the guidance settings of each row of the table."""
  yield 'none', config_lib.Guidance(method='none')
  fifty = dict(conditional_candidates=50, unconditional_candidates=50)
  for name, settings in (
    ('component', dict(method='component')),
    ('resample', dict(method='resample')),
    ('resample, 50 + 50 candidates', dict(method='resample', **fifty)),
  ):
    for scale in map(float, _SCALES.value):
      yield name, config_lib.Guidance(scale=scale, **settings)


def main(argv: list[str]) -> None:
  """Draws and evaluates samples. Prints the table."""
  del argv
  host.configure_malloc()
  run = api.load(_RUN.value)
  config = run.config
  if _DENOISE.value is not None:
    config = config.with_sampling(denoise=_DENOISE.value)
  evaluate = sample_quality.SampleEvaluator(config.data, run.workdir / 'fidelity')
  training_images = evaluate.training_images(len(evaluate.images['label']))
  distance = evaluate(training_images['image'], training_images['label']).distance
  print(f'Held-out images: accuracy {evaluate.accuracy:.3f}. The same number of training images:')
  print(f'Fréchet distance {distance:.2f}.\n')
  labels = np.arange(_COUNT.value) % config.data.num_classes

  def row(name: str, guidance: config_lib.Guidance) -> dict[str, object]:
    sampler = sampling.Sampler(run.model, config.with_sampling(guidance=guidance))
    images, nonfinite = sample_quality.draw(sampler, run.params, labels, _BATCH_SIZE.value)
    quality = evaluate(images, labels)
    return {
      'guidance': name,
      'scale': f'{guidance.scale:g}',
      'accuracy': f'{quality.accuracy:.3f}',
      'Fréchet distance': f'{quality.distance:.2f}',
      'precision': f'{quality.precision:.3f}',
      'recall': f'{quality.recall:.3f}',
      'not finite': nonfinite,
    }

  timing.print_table(row(*variant) for variant in variants())


if __name__ == '__main__':
  app.run(main)
