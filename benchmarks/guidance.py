"""Guidance methods and scales: accuracy of a classifier on samples, and Fréchet distance.

    python -m benchmarks.guidance --run=RUN --count=5000

The classifier is trained on the training images of the run. The Fréchet distance compares its
features between samples and real images. The classes of the samples have the frequencies of the
training images. Prints a Markdown table.
"""

from collections.abc import Iterator

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
_REFERENCE = flags.DEFINE_enum(
  'reference', 'valid', ['valid', 'train'], 'Split of the real images. Small splits need train.'
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
  folder = run.workdir / 'fidelity'
  evaluate = sample_quality.SampleEvaluator(config.data, folder, _REFERENCE.value)
  print(f'Accuracy on held-out images: {evaluate.accuracy:.3f}. Real images of the other split:')
  print(f'{evaluate.real_images()}.\n')
  labels = evaluate.training_images(_COUNT.value)['label']

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
