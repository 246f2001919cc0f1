"""How long sampling takes: prior, guidance, and the inverse of the flow each way.

    python -m benchmarks.sampling_speed --run=RUN      # a trained run: modes and batch sizes
    python -m benchmarks.sampling_speed                # random weights: 64×64×3, and scaling

Prints tables in Markdown; milliseconds an image, medians of several calls after compilation, all
variants of a table taking turns.
"""

import dataclasses
import functools

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import judge, timing
from configs import fashion_mnist
from farmer_jax import config as config_lib
from farmer_jax import sampling
from farmer_jax.nn import farmer
from farmer_jax.xla import host

_RUN = flags.DEFINE_string('run', None, 'Workdir of a trained run.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Calls of each variant.')
_BATCHES = flags.DEFINE_list('batches', ['1', '8', '64'], 'Batch sizes for --run.')


def trained_run(path):
  """Every way to invert, and every way to guide, at several batch sizes."""
  config, model, params, _ = judge.load(path)
  blocks, unknown = config.model.flow.blocks, model.tokens - 1
  print('| batch | inverse | ms/image | passes over the tokens, by block | largest difference |')
  print('| --- | --- | --- | --- | --- |')
  for batch in map(int, _BATCHES.value):
    numbers = np.arange(batch)
    labels = numbers % max(config.data.num_classes, 1)
    z = sampling.Sampler(model, config).latents(params, labels, numbers)
    plan = sampling.plan_inverse(
      model, judge.with_sampling(config, inverse='auto'), params, z, labels
    )
    ways = {'sequential': (1,) * blocks, 'parallel': (unknown,) * blocks}
    ways |= {f'chunks of {chunk}': (chunk,) * blocks for chunk in (4, 16)}
    ways |= {f'auto {plan["chunks"]}': tuple(plan['chunks'])}
    samplers = {name: sampling.Sampler(model, config, chunks) for name, chunks in ways.items()}
    calls = {n: functools.partial(s.images, params, z, labels) for n, s in samplers.items()}
    exact = calls['sequential']().values
    for name, seconds in timing.medians(calls, _REPEATS.value).items():
      samples = calls[name]()
      passes = '–' if name == 'sequential' else ', '.join(f'{p:.1f}' for p in samples.passes.max(1))
      difference = float((abs(samples.values - exact) / (1 + abs(exact))).max())
      print(f'| {batch} | {name} | {1e3 * seconds / batch:.2f} | {passes} | {difference:.0e} |')
  print('\n| batch | guidance | prior, ms/image |\n| --- | --- | --- |')
  for batch in map(int, _BATCHES.value):
    numbers = np.arange(batch)
    calls = {}
    for method in ('none', 'component', 'resample'):
      guidance = config_lib.Guidance(method=method, scale=1.0)
      sampler = sampling.Sampler(model, judge.with_sampling(config, guidance=guidance))
      calls[method] = functools.partial(sampler.latents, params, numbers % 10, numbers)
    for name, seconds in timing.medians(calls, _REPEATS.value).items():
      print(f'| {batch} | {name} | {1e3 * seconds / batch:.2f} |')


def random_model(image_size, patch_size, channels, flow, prior):
  """A model with random weights, somewhat away from the identity."""
  config = config_lib.from_config_dict(fashion_mnist.get_config())
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, image_size=image_size, channels=channels),
    model=dataclasses.replace(
      config.model,
      patch_size=patch_size,
      flow=dataclasses.replace(config.model.flow, **flow),
      prior=dataclasses.replace(config.model.prior, **prior),
    ),
  )
  model = farmer.build(config)
  params = jax.jit(functools.partial(farmer.init_params, model=model))(jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  params = jax.tree.map(lambda a: a + 0.01 * jax.random.normal(next(keys), a.shape), params)
  return config, model, params


def calls_for(config, model, params, batch):
  """Prior and sequential inverse of a batch."""
  numbers = np.arange(batch)
  sampler = sampling.Sampler(model, config)
  z = sampler.latents(params, numbers % 10, numbers)
  return {
    'prior': functools.partial(sampler.latents, params, numbers % 10, numbers),
    'inverse': functools.partial(sampler.images, params, z, numbers % 10),
  }


def random_weights():
  """64×64×3 in patches of 4, and how time grows with tokens and with blocks."""
  large = dict(layers=3, width=256)
  built = random_model(64, 4, 3, dict(blocks=4, **large), dict(large, informative_channels=24))
  count = sum(leaf.size for leaf in jax.tree.leaves(built[2])) / 1e6
  times = timing.medians(calls_for(*built, batch=8), _REPEATS.value)
  print(f'64×64×3, patch 4, {count:.1f} M parameters, batch 8, s/image: ', end='')
  print(', '.join(f'{name} {seconds / 8:.3f}' for name, seconds in times.items()))
  small = dict(layers=2, width=128)
  variants = {
    f'{(size // 4) ** 2} | {blocks}': (size, blocks)
    for size, blocks in ((32, 4), (64, 4), (128, 4), (64, 2), (64, 8))
  }
  calls = {}
  for name, (size, blocks) in variants.items():
    built = random_model(size, 4, 3, dict(blocks=blocks, **small), small)
    calls[name] = calls_for(*built, batch=8)['inverse']
  print('\n| tokens | blocks | inverse, ms/image | ms/(image · block · token) |')
  print('| --- | --- | --- | --- |')
  for name, seconds in timing.medians(calls, _REPEATS.value).items():
    size, blocks = variants[name]
    milliseconds = 1e3 * seconds / 8
    each = milliseconds / blocks / (size // 4) ** 2
    print(f'| {name} | {milliseconds:.1f} | {each:.4f} |')


def main(argv):
  """Runs the tables."""
  del argv
  logging.set_verbosity(logging.WARNING)
  host.keep_memory()
  print(f'{jax.devices()[0].device_kind}, JAX {jax.__version__}\n')
  if _RUN.value:
    trained_run(_RUN.value)
  else:
    random_weights()


if __name__ == '__main__':
  app.run(main)
