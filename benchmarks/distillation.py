"""What a student is worth: time, closeness to the exact inverse, and the Fréchet distance.

    python -m benchmarks.distillation --runs=STUDENT,STUDENT2,…

The first run gets the full table, exact inverses beside it; every run gets a line of the second.
Prints tables in Markdown.
"""

import functools

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import judge, timing
from farmer_jax import losses, sampling
from farmer_jax.ops import dequantize
from farmer_jax.xla import host

_RUNS = flags.DEFINE_list('runs', None, "Workdirs of students' runs.", required=True)
_COUNT = flags.DEFINE_integer('count', 5000, 'Samples, and held-out images, for each line.')
_BATCH = flags.DEFINE_integer('batch', 250, 'Images treated together for these.')
_BATCHES = flags.DEFINE_list('batches', ['1', '8', '64'], 'Batch sizes that are timed.')
_REPEATS = flags.DEFINE_integer('repeats', 9, 'Calls of each variant that is timed.')


def samplers_for(config, model):
  """Every way to invert the flow."""

  def student(rounds):
    changed = judge.with_sampling(config, inverse='student', refinement_rounds=rounds)
    return sampling.Sampler(model, changed)

  sequential = judge.with_sampling(config, inverse='sequential')
  together = (model.tokens - 1,) * config.model.flow.blocks
  return {
    'sequential': sampling.Sampler(model, sequential),
    'parallel fixed point': sampling.Sampler(model, sequential, together),
    'student': student(0),
    'student + 1 round': student(1),
    **{f'student + {rounds} rounds': student(rounds) for rounds in (2, 4)},
    'student + rounds to the tolerance': student(model.tokens),
  }


class Reconstruction:
  """Latents of held-out images, and how well an inverse gives the images back."""

  def __init__(self, config, model, params, images):
    key = jax.random.key(0)
    self._labels = images['label'][: _COUNT.value]
    self._images = losses.real_valued(key, images['image'][: _COUNT.value], config.noise)
    encode = jax.jit(functools.partial(model.apply, method='encode'))
    self._latents = np.concatenate(
      [encode({'params': params}, self._images[i], self._labels[i])[0] for i in self._parts()]
    )

  def _parts(self):
    return (slice(i, i + _BATCH.value) for i in range(0, len(self._labels), _BATCH.value))

  def __call__(self, sampler, params):
    """PSNR in dB, and the mean number of passes over the tokens of each block."""
    squares, passes = [], []
    for part in self._parts():
      samples = sampler.images(params, self._latents[part], self._labels[part])
      squares.append(np.asarray(((samples.values - self._images[part]) ** 2).mean()))
      passes.append(np.asarray(samples.passes.mean(1)))
    return dequantize.psnr(float(np.sqrt(np.mean(squares)))), np.mean(passes, 0)


def main(argv):
  """Prints both tables."""
  del argv
  logging.set_verbosity(logging.WARNING)
  host.keep_memory()
  judged = reconstruct = labels = None
  print(f'{jax.devices()[0].device_kind}, JAX {jax.__version__}\n')
  lines = []
  for number, run in enumerate(_RUNS.value):
    config, model, params, workdir = judge.load(run)
    noisy = judge.with_sampling(config, denoise=False)
    if judged is None:
      judged = judge.Judge(config, workdir)
      reconstruct = Reconstruction(config, model, params, judged.images)
      labels = np.arange(_COUNT.value) % config.data.num_classes
      full_table(config, noisy, model, params, judged, reconstruct, labels)
    sampler = samplers_for(noisy, model)['student']
    found, _ = reconstruct(sampler, params)
    z = sampler.latents(params, labels[:500], np.arange(500))
    drawn = sampling.compare_student(model, noisy, params, z, labels[:500])['psnr']
    images, _ = judge.draw(samplers_for(config, model)['student'], params, labels, _BATCH.value)
    _, distance = judged(images, labels)
    d = config.distill
    lines.append(
      f'| {number + 1} | {d.objective} | {d.input_noise:g} | {d.drawn_share:g} |'
      f' {config.train.steps} | {found:.2f} | {drawn:.2f} | {distance:.2f} |'
    )
  print('\n| | objective | input noise | drawn share | steps | PSNR, held-out | PSNR, drawn | FD |')
  print('| --- ' * 8 + '|')
  print('\n'.join(lines))


def full_table(config, noisy, model, params, judged, reconstruct, labels):
  """A line for each way to invert."""
  times: dict[str, list[str]] = {}
  for batch in map(int, _BATCHES.value):
    ways = samplers_for(noisy, model)
    z = ways['sequential'].latents(params, labels[:batch], np.arange(batch))
    calls = {n: functools.partial(s.images, params, z, labels[:batch]) for n, s in ways.items()}
    for name, seconds in timing.medians(calls, _REPEATS.value).items():
      times.setdefault(name, []).append(f'{1e3 * seconds / batch:.2f}')
  header = ' | '.join(f'ms, batch {batch}' for batch in _BATCHES.value)
  print(f'| inverse | {header} | passes, by block | PSNR, held-out, dB | Fréchet distance |')
  print('| --- ' * (4 + len(_BATCHES.value)) + '|')
  ways = zip(samplers_for(noisy, model).items(), samplers_for(config, model).values(), strict=True)
  for (name, plain), sampler in ways:
    found, passes = reconstruct(plain, params)
    images, _ = judge.draw(sampler, params, labels, _BATCH.value)
    _, distance = judged(images, labels)
    rounds = '–' if name == 'sequential' else ', '.join(f'{count:.1f}' for count in passes)
    print(f'| {name} | {" | ".join(times[name])} | {rounds} | {found:.1f} | {distance:.2f} |')


if __name__ == '__main__':
  app.run(main)
