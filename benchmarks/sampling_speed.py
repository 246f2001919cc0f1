"""Measures the time of sampling: the prior, guidance, and each inverse of the flow.

    python -m benchmarks.sampling_speed --run=RUN      # a trained run
    python -m benchmarks.sampling_speed                # random weights: 64×64×3, and scaling

Prints Markdown tables. Each time is the median of several calls after compilation. The variants of
a table are called in turn.
"""

import functools

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import shared_flags, timing
from configs import fashion_mnist
from farmer_jax import api, sampling
from farmer_jax import config as config_lib
from farmer_jax.nn import farmer
from farmer_jax.xla import host

_RUN = flags.DEFINE_string('run', None, 'Workdir of a trained run. None uses random weights.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed calls per variant.')
_BATCHES = flags.DEFINE_list('batches', ['1', '8', '64'], 'Batch sizes, with --run.')


def inverses_of_run(run):
  """Yields one table row per batch size and inverse of the flow."""
  model, params, blocks = run.model, run.params, run.config.model.flow.blocks
  config = run.config.with_sampling(denoise=False)  # Denoising is no part of the inverse.
  for batch in map(int, _BATCHES.value):
    indices = np.arange(batch)
    labels = indices % max(run.config.data.num_classes, 1)
    z = sampling.Sampler(model, config).latents(params, labels, indices)
    auto = config.with_sampling(inverse='auto')
    plan = sampling.plan_inverse(model, auto, params, z, labels)
    chunk_sizes = {
      'sequential': [1] * blocks,
      'parallel': [model.num_tokens - 1] * blocks,
      **{f'chunks of {size}': [size] * blocks for size in (4, 16)},
      f'auto {plan["chunk_sizes"]}': plan['chunk_sizes'],
    }
    calls = {
      name: functools.partial(sampling.Sampler(model, config, sizes).images, params, z, labels)
      for name, sizes in chunk_sizes.items()
    }
    exact = calls['sequential']().values
    for name, seconds in timing.medians(calls, _REPEATS.value, shared_flags.clock()).items():
      samples = calls[name]()
      passes = '–' if name == 'sequential' else ', '.join(f'{p:.1f}' for p in samples.passes.max(1))
      difference = float((abs(samples.values - exact) / (1 + abs(exact))).max())
      yield {
        'batch': batch,
        'inverse': name,
        'ms/image': f'{1e3 * seconds / batch:.2f}',
        'passes over the tokens, by block': passes,
        'largest difference': f'{difference:.0e}',
      }


def guidance_of_run(run):
  """Yields one table row per batch size and guidance method, with the time of the prior."""
  for batch in map(int, _BATCHES.value):
    indices = np.arange(batch)
    calls = {}
    for method in ('none', 'component', 'resample'):
      guidance = config_lib.Guidance(method=method, scale=1.0)
      config = run.config.with_sampling(guidance=guidance)
      sampler = sampling.Sampler(run.model, config)
      calls[method] = functools.partial(sampler.latents, run.params, indices % 10, indices)
    for name, seconds in timing.medians(calls, _REPEATS.value, shared_flags.clock()).items():
      milliseconds = f'{1e3 * seconds / batch:.2f}'
      yield {'batch': batch, 'guidance': name, 'prior, ms/image': milliseconds}


def random_model(image_size, flow, prior):
  """Returns the configuration, model and parameters for RGB images in patches of 4.

  Noise on the initial parameters makes the flow different from the identity.
  """
  values = fashion_mnist.get_config()
  values.data.update(image_size=image_size, channels=3)
  values.model.update(patch_size=4, flow=flow, prior=prior)
  config = config_lib.from_config_dict(values)
  model = farmer.build(config)
  params = jax.jit(functools.partial(farmer.init_params, model=model))(jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  params = jax.tree.map(lambda a: a + 0.01 * jax.random.normal(next(keys), a.shape), params)
  return config, model, params


def prior_and_inverse(config, model, params, batch):
  """Returns a function that draws latents and a function that inverts the flow sequentially."""
  indices = np.arange(batch)
  sampler = sampling.Sampler(model, config)
  z = sampler.latents(params, indices % 10, indices)
  return {
    'prior': functools.partial(sampler.latents, params, indices % 10, indices),
    'inverse': functools.partial(sampler.images, params, z, indices % 10),
  }


def random_weights():
  """Prints the time for 64×64×3, and the times for several numbers of tokens and blocks."""
  batch, large = 8, dict(layers=3, width=256)
  built = random_model(64, dict(blocks=4, **large), dict(large, informative_channels=24))
  millions = sum(leaf.size for leaf in jax.tree.leaves(built[2])) / 1e6
  times = timing.medians(prior_and_inverse(*built, batch), _REPEATS.value, shared_flags.clock())
  seconds = ', '.join(f'{name} {value / batch:.3f}' for name, value in times.items())
  print(f'64×64×3, patch size 4, {millions:.1f} M parameters, batch size 8, s/image: {seconds}\n')
  small = dict(layers=2, width=128)
  variants = [(32, 4), (64, 4), (128, 4), (64, 2), (64, 8)]
  calls = {}
  for size, blocks in variants:
    built = random_model(size, dict(blocks=blocks, **small), small)
    calls[size, blocks] = prior_and_inverse(*built, batch)['inverse']

  def row(size, blocks, seconds):
    tokens, milliseconds = (size // 4) ** 2, 1e3 * seconds / batch
    return {
      'tokens': tokens,
      'blocks': blocks,
      'inverse, ms/image': f'{milliseconds:.1f}',
      'ms/(image · block · token)': f'{milliseconds / blocks / tokens:.4f}',
    }

  medians = timing.medians(calls, _REPEATS.value, shared_flags.clock())
  timing.print_table(row(*variant, seconds) for variant, seconds in medians.items())


def main(argv):
  """Prints the tables."""
  del argv
  logging.set_verbosity(logging.WARNING)
  host.configure_malloc()
  print(f'{jax.devices()[0].device_kind}, JAX {jax.__version__}\n')
  if _RUN.value:
    run = api.load(_RUN.value)
    timing.print_table(inverses_of_run(run))
    print()
    timing.print_table(guidance_of_run(run))
  else:
    random_weights()


if __name__ == '__main__':
  app.run(main)
