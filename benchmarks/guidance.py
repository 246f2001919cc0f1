"""What guidance is worth: how often a classifier recognises the class, and the Fréchet distance.

    python -m benchmarks.guidance --run=RUN --count=5000

The classifier is trained on the run's real training images; distances are between its features of
samples and of the held-out images. Prints a table in Markdown.
"""

import numpy as np
from absl import app, flags, logging

from benchmarks import judge
from farmer_jax import config as config_lib
from farmer_jax import sampling, terminal
from farmer_jax.xla import host

_RUN = flags.DEFINE_string('run', None, 'Workdir of a trained run.', required=True)
_COUNT = flags.DEFINE_integer('count', 5000, 'Samples for each line.')
_BATCH = flags.DEFINE_integer('batch', 250, 'Samples drawn together.')
_DENOISE = flags.DEFINE_bool('denoise', None, "Clean samples up; the default is the run's.")
_SCALES = flags.DEFINE_list('scales', ['0.25', '0.5', '1', '2', '3', '4'], 'Guidance scales.')


def settings():
  """Names and `config.Guidance` of the lines of the table."""
  yield 'none', config_lib.Guidance(method='none')
  for method in ('component', 'resample'):
    for scale in map(float, _SCALES.value):
      yield method, config_lib.Guidance(method=method, scale=scale)
  for scale in map(float, _SCALES.value):
    name = 'resample, 50 + 50 candidates'
    pool = dict(conditional_candidates=50, unconditional_candidates=50)
    yield name, config_lib.Guidance(scale=scale, **pool)


def main(argv):
  """Draws and judges."""
  del argv
  logging.set_verbosity(logging.WARNING)
  host.keep_memory()
  config, model, params, workdir = judge.load(_RUN.value)
  if _DENOISE.value is not None:
    config = judge.with_sampling(config, denoise=_DENOISE.value)
  judged = judge.Judge(config, workdir)
  print(f'Real held-out images: accuracy {judged.accuracy:.3f}, Fréchet distance')
  print(f'of as many training images {judged.floor:.2f}.\n')
  print('| guidance | scale | accuracy | Fréchet distance | not finite |')
  print('| --- | --- | --- | --- | --- |')
  labels = np.arange(_COUNT.value) % config.data.num_classes
  for name, guidance in settings():
    sampler = sampling.Sampler(model, judge.with_sampling(config, guidance=guidance))
    images, broken = judge.draw(sampler, params, labels, _BATCH.value)
    accuracy, distance = judged(images, labels)
    scale = f'{guidance.scale:g}'
    print(f'| {name} | {scale} | {accuracy:.3f} | {distance:.2f} | {broken} |', flush=True)
    terminal.say(f'{name} {scale} done')


if __name__ == '__main__':
  app.run(main)
