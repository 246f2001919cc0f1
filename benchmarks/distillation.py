"""Measures students: time, difference from the exact inverse, and Fréchet distance of samples.

    python -m benchmarks.distillation --runs=STUDENT,STUDENT2,…

Prints two Markdown tables. The first table compares the student of the first run with the exact
inverses of the flow. The second table has one row per run. Its PSNR of held-out images is relative
to noisy images, also for students that remove the noise.
"""

import dataclasses
import functools

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import sample_quality, shared_flags, timing
from farmer_jax import api, noise, sampling
from farmer_jax import config as config_lib
from farmer_jax.ops import units
from farmer_jax.xla import host

_RUNS = flags.DEFINE_list('runs', None, 'Workdirs of distillation runs.', required=True)
_COUNT = flags.DEFINE_integer('count', 5000, 'Number of samples and of held-out images.')
_BATCH = flags.DEFINE_integer('batch', 250, 'Batch size for samples and held-out images.')
_BATCHES = flags.DEFINE_list('batches', ['1', '8', '64'], 'Batch sizes to time.')
_REPEATS = flags.DEFINE_integer('repeats', 9, 'Timed calls per variant.')

# Images for the PSNR between samples of the student and of the exact inverse.
_COMPARED_SAMPLES = 500


def make_samplers(run, **settings):
  """Returns {inverse of the flow: sampler}. `settings` replace sampling settings of the run."""

  def student(rounds):
    changes = dict(inverse='student', refinement_rounds=rounds, **settings)
    return sampling.Sampler(run.model, run.config.with_sampling(**changes))

  sequential = run.config.with_sampling(inverse='sequential', **settings)
  num_tokens, blocks = run.model.num_tokens, run.config.model.flow.blocks
  samplers = {
    'sequential': sampling.Sampler(run.model, sequential),
    'parallel fixed point': sampling.Sampler(run.model, sequential, [num_tokens - 1] * blocks),
    'student': student(0),
  }
  if not run.config.distill.denoise:  # Refinement converges to the noisy image.
    for rounds in (1, 2, 4):
      samplers[f'student + {rounds} round{"s" if rounds > 1 else ""}'] = student(rounds)
    samplers['student + rounds to the tolerance'] = student(num_tokens)
  return samplers


class Reconstruction:
  """Encodes held-out images. Measures how well a sampler recovers the images from the latents."""

  def __init__(self, run, images):
    images, labels = images['image'][: _COUNT.value], images['label'][: _COUNT.value]
    values = noise.build(run.config.noise).evaluation_images(jax.random.key(0), images)
    encode = jax.jit(functools.partial(run.model.apply, {'params': run.params}, method='encode'))
    batches = [slice(i, i + _BATCH.value) for i in range(0, len(labels), _BATCH.value)]
    self._batches = [(values[i], labels[i], encode(values[i], labels[i])[0]) for i in batches]

  def __call__(self, sampler, params):
    """Returns the PSNR in dB, and the mean number of passes over the tokens per flow block."""
    errors, passes = [], []
    for values, labels, latents in self._batches:
      samples = sampler.images(params, latents, labels)
      errors.append(np.asarray(((samples.values - values) ** 2).mean()))
      passes.append(np.asarray(samples.passes.mean(1)))
    return units.psnr(float(np.sqrt(np.mean(errors)))), np.mean(passes, 0)


def compare_inverses(run, evaluate, reconstruct, labels):
  """Yields one table row per inverse of the flow."""
  noisy = make_samplers(run, denoise=False)
  times = {name: {} for name in noisy}
  for batch in map(int, _BATCHES.value):
    z = noisy['sequential'].latents(run.params, labels[:batch], np.arange(batch))
    calls = {
      name: functools.partial(sampler.images, run.params, z, labels[:batch])
      for name, sampler in noisy.items()
    }
    for name, seconds in timing.medians(calls, _REPEATS.value, shared_flags.clock()).items():
      times[name][f'ms/image, batch {batch}'] = f'{1e3 * seconds / batch:.2f}'
  for name, sampler in make_samplers(run).items():
    psnr, passes = reconstruct(noisy[name], run.params)
    images, _ = sample_quality.draw(sampler, run.params, labels, _BATCH.value)
    rounds = '–' if name == 'sequential' else ', '.join(f'{count:.1f}' for count in passes)
    yield {
      'inverse': name,
      **times[name],
      'passes, by block': rounds,
      'PSNR of held-out images, dB': f'{psnr:.1f}',
      'Fréchet distance': f'{evaluate(images, labels).distance:.2f}',
    }


def student_row(number, run, evaluate, reconstruct, labels):
  """Returns the table row of a run, {column: cell}."""
  noisy = make_samplers(run, denoise=False)['student']
  held_out, _ = reconstruct(noisy, run.params)
  compared = labels[:_COMPARED_SAMPLES]
  z = noisy.latents(run.params, compared, np.arange(len(compared)))
  config = run.config.with_sampling(denoise=False)
  drawn = sampling.compare_student(run.model, config, run.params, z, compared)['psnr']
  sampler = make_samplers(run)['student']
  images, _ = sample_quality.draw(sampler, run.params, labels, _BATCH.value)
  keys, defaults = dataclasses.asdict(run.config.distill), dataclasses.asdict(config_lib.Distill())
  changed = [f'{key}={value}' for key, value in keys.items() if value != defaults[key]]
  return {
    'run': number,
    'settings of config.distill': ', '.join(changed) or 'defaults',
    'parameters': f'{sum(a.size for a in jax.tree.leaves(run.params["student"])):,}',
    'steps': run.config.train.steps,
    'PSNR of held-out images, dB': f'{held_out:.2f}',
    'PSNR of samples, dB': f'{drawn:.2f}',
    'Fréchet distance': f'{evaluate(images, labels).distance:.2f}',
  }


def main(argv):
  """Prints both tables."""
  del argv
  logging.set_verbosity(logging.WARNING)
  host.configure_malloc()
  print(f'{jax.devices()[0].device_kind}, JAX {jax.__version__}\n')
  runs = [api.load(path) for path in _RUNS.value]
  evaluate = sample_quality.SampleEvaluator(runs[0].config.data, runs[0].workdir / 'fidelity')
  reconstruct = Reconstruction(runs[0], evaluate.images)
  labels = np.arange(_COUNT.value) % runs[0].config.data.num_classes
  timing.print_table(compare_inverses(runs[0], evaluate, reconstruct, labels))
  print()
  arguments = evaluate, reconstruct, labels
  timing.print_table(student_row(number, run, *arguments) for number, run in enumerate(runs, 1))


if __name__ == '__main__':
  app.run(main)
