"""Measures training and sampling of the ImageNet models on one accelerator. Takes up to 25 minutes.

    python -m benchmarks.accelerator --out=accelerator.json
    python -m benchmarks.accelerator --tiny                   # tiny models, also on CPUs

Prints one row of a Markdown table per measurement, and writes all rows to OUT after each of them,
so that an interrupted benchmark keeps what it has measured. Weights are random, with noise on the
initial values, so that the flow is not the identity. Jacobi iteration therefore takes another
number of rounds than with a trained model. Some rows name a published time per image (arXiv
2510.23588). The paper states neither the size of its model nor the device.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath

from benchmarks import timing, training_step
from configs import in256
from farmer_jax import config as config_lib
from farmer_jax import losses, sampling
from farmer_jax.nn import attention, farmer, student
from farmer_jax.xla import cycles, flops, hlo, host, memory, roofline

_OUT = flags.DEFINE_string('out', 'accelerator.json', 'File of all rows.')
_MINUTES = flags.DEFINE_float('minutes', 25, 'Measurements that begin later are skipped.')
_ONLY = flags.DEFINE_list('only', ['attention', 'training', 'sampling'], 'Parts to measure.')
_TINY = flags.DEFINE_bool('tiny', False, 'Tiny models, to test this program.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls per measurement.')
_DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'Data types of sampling.')

# Seconds per image, from the tables of inference times in arXiv 2510.23588.
_PUBLISHED = {'forward': 0.0066, 'sequential inverse': 0.1689, 'prior': 0.05, 'student': 0.0076}
_MEMORY_SHARE = 0.9  # of the device, which the largest batch may take

Row = dict[str, Any]
Measurement = tuple[str, Callable[[], Iterator[Row]]]  # name, function that yields rows


def model_config(variant: str, **model: Any) -> config_lib.Config:
  """Returns the configuration of a model of configs/in256.py, or of a tiny one with --tiny."""
  values = in256.get_config(variant)
  values.model.update(model)
  if _TINY.value:
    values.data.update(image_size=32, num_classes=10)
    values.model.update(patch_size=4 if variant.endswith('16') else 2)
    values.model.flow.update(blocks=2, layers=1, width=32, head_dim=16)
    values.model.prior.update(layers=1, width=32, head_dim=16, condition_copies=2, components=3)
    values.model.prior.update(informative_channels=4, redundant_components=4)
  return config_lib.from_config_dict(values)


def random_params(config: config_lib.Config, is_student: bool = False) -> Any:
  """Returns initial parameters of the model with noise, in one compiled program."""
  model = student.build(config)

  @jax.jit
  def init() -> Any:
    params = farmer.init_params(jax.random.key(0), model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
      a + 0.002 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys, strict=True)
    ]
    params = jax.tree.unflatten(tree, noisy)
    if is_student:
      initialized = losses.init_student(jax.random.key(2), params, model=model)
      params |= {'student': nn.unbox(initialized['student'])}
    return params

  return init()


# Attention alone.


def attention_rows() -> Iterator[Row]:
  """Yields the time of attention of one layer, forward and backward, for each implementation."""
  batch, width = (2, 32) if _TINY.value else (64, 768)
  for tokens in (32, 64) if _TINY.value else (256, 1024):
    x = jax.random.normal(jax.random.key(0), (3, batch, tokens, width), jnp.bfloat16)
    calls = {}
    for setting in ('xla', 'auto'):

      def loss(x: jax.Array, setting: Any = setting) -> jax.Array:
        q, k, v = (attention.split_heads(a, 64 if width > 64 else 16) for a in x)
        return attention.attend(q, k, v, causal=True, setting=setting).astype(jnp.float32).sum()

      calls[setting] = functools.partial(jax.jit(jax.grad(loss)), x)
    for setting, seconds in timing.medians(calls, _REPEATS.value).items():
      # The forward pass has two products and the backward pass has five. A product takes two FLOPs
      # per pair of factors, and the causal mask removes half of the pairs.
      needed = 7 * batch * tokens * tokens * width
      yield {
        'measurement': f'attention, {batch} x {tokens} tokens, forward and backward',
        'variant': setting,
        'seconds': seconds,
        'TFLOP/s': needed / seconds / 1e12,
      }


# Training.


def largest_batch(step: training_step.TrainingStep, multiple: int) -> int:
  """Returns the largest batch size that fits, from the memory of the programs for two sizes."""
  stats = jax.devices()[0].memory_stats() or {}
  limit = _MEMORY_SHARE * stats.get('bytes_limit', 2**30)
  small, large = (memory.of_program(step.compile(size)).total for size in (multiple, 2 * multiple))
  sizes = 1 + (limit - small) / max(large - small, 1)
  return multiple * max(1, min(int(sizes), 2 if _TINY.value else 64))


def step_seconds(step: training_step.TrainingStep, compiled: Any, batch_size: int) -> float:
  """Returns the median time of a step."""
  call = training_step.stepper(compiled, step.state(), step.batch(batch_size))
  return timing.medians({'': call}, _REPEATS.value)['']


def training_rows(variant: str, setting: str, remat: str) -> Iterator[Row]:
  """Yields the speed of training with the largest batch that fits."""
  step = training_step.TrainingStep(model_config(variant, attention=setting, remat=remat))
  batch_size = largest_batch(step, multiple=2 if _TINY.value else 16)
  while True:
    try:
      compiled = step.compile(batch_size)
      seconds = step_seconds(step, compiled, batch_size)
      break
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error) or batch_size == 1:
        raise
      batch_size = max(1, 3 * batch_size // 4)
  train = dataclasses.replace(step.config.train, batch_size=batch_size)
  needed = flops.training_step(dataclasses.replace(step.config, train=train))
  peak = flops.chip(jax.devices()[0].device_kind).peak_flops
  yield {
    'measurement': f'training step, {variant}, batch {batch_size}',
    'variant': f'attention {setting}, remat {remat}',
    'seconds': seconds,
    'bound, s': _bound(compiled),
    'images/s': batch_size / seconds,
    'TFLOP/s': needed / seconds / 1e12,
    'MFU': needed / seconds / peak if peak else None,
    'memory, GiB': memory.of_program(compiled).total / 2**30,
  }


# Sampling.


def sampling_rows(dtype: str, batch_size: int) -> Iterator[Row]:
  """Yields the time per image of the forward pass, of each inverse, and of the prior."""
  config = model_config('1.1b-p16').with_sampling(dtype=dtype, batch_size=batch_size, denoise=False)
  params = random_params(config, is_student=True)
  model = sampling.in_sampling_dtype(student.build(config), config.sampling)
  labels = np.arange(batch_size, dtype=np.int32) % config.data.num_classes
  latents = functools.partial(_sampler(model, config).latents, params, labels, labels)
  z = latents()
  plan = sampling.plan_inverse(model, config, params, z, labels)
  blocks, all_tokens = config.model.flow.blocks, model.num_tokens - 1
  images = _sampler(model, config).images(params, z, labels)
  encode = jax.jit(functools.partial(model.apply, method='encode'))
  plain = config.with_sampling(guidance=config_lib.Guidance(method='none'))

  def inverse(chunk_size: int | None, **settings: Any) -> sampling.Sampler:
    chunk_sizes = plan['chunk_sizes'] if chunk_size is None else [chunk_size] * blocks
    return _sampler(model, config.with_sampling(**settings), chunk_sizes)

  inverses = {
    'sequential inverse': inverse(1),
    'parallel inverse': inverse(all_tokens),
    f'automatic inverse, chunks {plan["chunk_sizes"]}': inverse(None),
    'student': inverse(1, inverse='student'),
  }
  priors = {'prior': _sampler(model, plain), 'guided prior': _sampler(model, config)}
  forward = functools.partial(encode, {'params': params}, images.values, labels)
  calls: dict[str, tuple[Callable[[], Any], Any]] = {
    'forward': (forward, encode.lower({'params': params}, images.values, labels)),
    **{
      name: (functools.partial(s.images, params, z, labels), _lower(s, params, labels, 'inverse'))
      for name, s in inverses.items()
    },
    **{
      name: (
        functools.partial(s.latents, params, *[labels] * 2),
        _lower(s, params, labels, 'prior'),
      )
      for name, s in priors.items()
    },
  }
  for name, (call, lowered) in calls.items():
    seconds, bound = timing.medians({name: call}, _REPEATS.value)[name], _bound(lowered.compile())
    row = {
      'measurement': f'{name}, batch {batch_size}',
      'variant': dtype,
      'seconds': seconds,
      'bound, s': bound,
      's/image': seconds / batch_size,
      'published s/image': _PUBLISHED.get(name),
    }
    if 'inverse' in name:
      difference = abs(call().values - images.values) / (1 + abs(images.values))
      row['largest difference'] = float(difference.max())
    yield row


def _lower(sampler: sampling.Sampler, params: Any, labels: Any, program: str) -> Any:
  return sampler.lower(params, jax.device_put(labels))[program]


def _bound(compiled: Any) -> float | None:
  """Returns the lower bound of the time of a program by its roofline, if the chip is known.

  Loops whose length depends on the data, such as Jacobi iteration, count one round.
  """
  program, chip = hlo.Program(compiled.as_text()), flops.chip(jax.devices()[0].device_kind)
  return roofline.bound(program, cycles.cost(program), chip).get('bound_seconds')


def _sampler(model: Any, config: config_lib.Config, chunk_sizes: Any = None) -> sampling.Sampler:
  return sampling.Sampler(model, config, chunk_sizes)


# The whole benchmark.


def measurements() -> Iterator[Measurement]:
  """Yields all measurements, the most important ones first."""
  if 'attention' in _ONLY.value:
    yield 'attention', attention_rows
  if 'training' in _ONLY.value:
    for variant, setting, remat in (
      ('1.1b-p16', 'auto', 'layers'),
      ('1.1b-p8', 'auto', 'layers'),
      ('1.1b-p16', 'xla', 'layers'),
      ('1.1b-p16', 'auto', 'dots'),
      ('1.1b-p8', 'xla', 'layers'),
    ):
      yield (
        f'training, {variant}, {setting}, {remat}',
        functools.partial(training_rows, variant, setting, remat),
      )
  if 'sampling' in _ONLY.value:
    for dtype in _DTYPES.value:
      for batch_size in (2, 4) if _TINY.value else (64, 256):
        yield (
          f'sampling, {dtype}, batch {batch_size}',
          functools.partial(sampling_rows, dtype, batch_size),
        )


def rows_of(name: str, function: Callable[[], Iterator[Row]]) -> Iterator[Row]:
  """Yields the rows of a measurement, and a row with the error if it fails."""
  start = time.monotonic()
  try:
    yield from function()
  except Exception as error:  # The other measurements must not be lost.
    logging.exception('%s failed.', name)
    yield {'measurement': name, 'error': f'{type(error).__name__}: {error}'[:300]}
  logging.info('%s took %.0f s.', name, time.monotonic() - start)


def main(argv: list[str]) -> None:
  """Measures, prints and writes the rows."""
  del argv
  started, device = time.monotonic(), jax.devices()[0].device_kind
  columns = (
    'bound, s',
    's/image',
    'published s/image',
    'images/s',
    'TFLOP/s',
    'MFU',
    'memory, GiB',
  )
  # Programs are compiled twice: for their call, and for their text.
  host.enable_compilation_cache(epath.Path(tempfile.mkdtemp(prefix='farmer-accelerator-')))
  report: dict[str, Any] = {'device': device, 'jax': jax.__version__, 'rows': []}
  print(f'{device}, JAX {jax.__version__}\n', flush=True)

  def printed() -> Iterator[Row]:
    for name, function in measurements():
      if time.monotonic() - started > 60 * _MINUTES.value:
        logging.warning('%s is skipped: %g minutes are over.', name, _MINUTES.value)
        continue
      for row in rows_of(name, function):
        report['rows'].append(row)
        pathlib.Path(_OUT.value).write_text(json.dumps(report, indent=1))
        shown = {column: row.get(column) for column in (*columns, 'largest difference')}
        yield {
          'measurement': row['measurement'],
          'variant': row.get('variant', row.get('error', '')),
          'seconds': _format(row.get('seconds')),
          **{column: _format(value) for column, value in shown.items()},
        }

  timing.print_table(printed())


def _format(value: float | None) -> str:
  return '–' if value is None else f'{value:.3g}'


if __name__ == '__main__':
  app.run(main)
