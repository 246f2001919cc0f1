"""What guidance is worth: how often a classifier recognises the class, and the Fréchet distance.

    python -m benchmarks.guidance --run=RUN --count=5000

The classifier is trained on the run's real training images; distances are between its features of
samples and of the held-out images. Prints a table in Markdown.
"""

import dataclasses

import jax
import numpy as np
from absl import app, flags, logging

from farmer_jax import config as config_lib
from farmer_jax import sampling
from farmer_jax.data import sources
from farmer_jax.evaluation import classifier
from farmer_jax.jobs import sample
from farmer_jax.nn import farmer
from farmer_jax.ops import frechet
from farmer_jax.runtime import console, host
from farmer_jax.runtime import workdir as workdir_lib

_RUN = flags.DEFINE_string('run', None, 'Workdir of a trained run.', required=True)
_COUNT = flags.DEFINE_integer('count', 5000, 'Samples for each line.')
_BATCH = flags.DEFINE_integer('batch', 250, 'Samples drawn together.')
_DENOISE = flags.DEFINE_bool('denoise', None, 'Clean samples up; the default is the run\'s.')
_SCALES = flags.DEFINE_list('scales', ['0.25', '0.5', '1', '2', '3'], 'Guidance scales.')


def moments(features):
  """The Gaussian that a Fréchet distance compares."""
  found = frechet.Moments.of(features)
  return found.mean, found.covariance


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
  workdir = workdir_lib.absolute(_RUN.value)
  config = config_lib.from_config_dict(workdir_lib.read_config(workdir))
  if _DENOISE.value is not None:
    config = dataclasses.replace(
      config, sampling=dataclasses.replace(config.sampling, denoise=_DENOISE.value)
    )
  model = farmer.build(config)
  params, _ = sample.load_params(config, workdir, model)
  train_source, valid_source = (sources.load(config.data, split) for split in ('train', 'valid'))
  judge = classifier.load_or_train(config.data, train_source, workdir / 'fidelity')
  real = valid_source.gather(np.arange(len(valid_source)))
  features, classes = judge(real['image'])
  reference = moments(features)
  train = moments(judge(train_source.gather(np.arange(len(real['label'])))['image'])[0])
  print(f'Real held-out images: accuracy {(classes == real["label"]).mean():.3f}, Fréchet distance')
  print(f'of as many training images {frechet.frechet_distance(*train, *reference):.2f}.\n')
  print('| guidance | scale | accuracy | Fréchet distance | not finite |')
  print('| --- | --- | --- | --- | --- |')
  labels = np.arange(_COUNT.value) % config.data.num_classes
  numbers = np.arange(_COUNT.value)
  for name, guidance in settings():
    changed = dataclasses.replace(config.sampling, guidance=guidance)
    sampler = sampling.Sampler(model, dataclasses.replace(config, sampling=changed))
    parts = []
    for start in range(0, _COUNT.value, _BATCH.value):
      part = slice(start, start + _BATCH.value)
      parts.append(jax.device_get(sampler(params, labels[part], numbers[part])))
    images = np.concatenate([part.images for part in parts])
    broken = sum(int((~part.finite).sum()) for part in parts)
    features, classes = judge(images)
    distance = frechet.frechet_distance(*moments(features), *reference)
    accuracy = (classes == labels).mean()
    print(
      f'| {name} | {guidance.scale:g} | {accuracy:.3f} | {distance:.2f} | {broken} |', flush=True
    )
    console.say(f'{name} {guidance.scale:g} done')


if __name__ == '__main__':
  app.run(main)
