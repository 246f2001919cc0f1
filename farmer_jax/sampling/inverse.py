"""Measures the inverse of the flow when sampling, by chunks of tokens or by a student."""

import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array, PyTree

from farmer_jax.config import Config, Sampling
from farmer_jax.distributed import mesh, processes
from farmer_jax.nn.farmer import Farmer
from farmer_jax.ops import units
from farmer_jax.ops.arrays import Tokens
from farmer_jax.sampling.sampler import Labels, Sampler
from farmer_jax.workdir import layout

# Number of timed calls of each variant after its compilation. The fastest call counts.
_REPEATS = 3


def plan_inverse(
  model: Farmer, config: Config, params: PyTree, z: Tokens, labels: Labels
) -> dict[str, Any]:
  """Chooses a chunk size for the inverse of each flow block by measuring a batch of latents.

  A chunk size of 1 is the sequential inverse, which is exact. It is the reference for all errors.
  With inverse=auto, each block gets the fastest chunk size whose error is within the tolerance.
  With inverse=parallel or chunked, all blocks get the configured chunk size.

  Returns:
    A JSON-serializable dict with `chunk_sizes`, one for each block, `trials`, one dict for each
    block, and `difference`, the error after all blocks. A trial maps a chunk size to
    `ms_per_image`, `passes` (the largest number of passes over the tokens) and `error` (the largest
    difference from the sequential inverse, relative to 1 + |x|).
  """
  sampling = config.sampling
  candidates = _chunk_size_candidates(sampling, model.num_tokens)
  invert_block = jax.jit(
    functools.partial(model.apply, method='invert_block'),
    static_argnames=('chunk_size', 'tolerance'),
  )
  exact = planned = model.final_flow_output(z)
  chunk_sizes: list[int] = []
  trials: list[dict[int, dict[str, float]]] = []
  for block in reversed(range(config.model.flow.blocks)):
    invert = functools.partial(
      invert_block, {'params': params}, labels=labels, block=block, tolerance=sampling.tolerance
    )
    calls = {size: functools.partial(invert, z=exact, chunk_size=size) for size in candidates}
    results, milliseconds = _time_alternately(calls)
    exact = results[1][0]
    trial = {
      size: {
        'ms_per_image': milliseconds[size] / len(z),
        'passes': float(convergence.passes.max()),
        'error': _relative_difference(x, exact),
      }
      for size, (x, convergence) in results.items()
    }
    chunk_size = candidates[-1]
    if sampling.inverse == 'auto':
      accurate = [size for size in candidates if trial[size]['error'] <= sampling.tolerance]
      chunk_size = min(accurate, key=lambda size: trial[size]['ms_per_image'])
    chunk_sizes.insert(0, chunk_size)
    trials.insert(0, trial)
    planned, _ = invert(z=planned, chunk_size=chunk_size)
  difference = _relative_difference(planned, exact)
  return {'chunk_sizes': chunk_sizes, 'trials': trials, 'difference': difference}


def compare_student(
  model: Farmer, config: Config, params: PyTree, z: Tokens, labels: Labels
) -> dict[str, float]:
  """Compares the student's inverse of a batch of latents with the sequential inverse.

  Samples of the sequential inverse are denoised if the student also removes the noise.

  Returns:
    A JSON-serializable dict with `rmse` (root mean squared difference of values in [-1, 1]), `psnr`
    (this difference in dB), `difference` (largest difference relative to 1 + |x|), `ms_per_image`,
    `sequential_ms_per_image` and `speedup`.
  """
  calls = {}
  for inverse in ('sequential', 'student'):
    sampler = Sampler(model, config.with_sampling(inverse=inverse, denoise=config.distill.denoise))
    calls[inverse] = functools.partial(sampler.images, params, z, labels)
  samples, milliseconds = _time_alternately(calls)
  exact, student = samples['sequential'].values, samples['student'].values
  rmse = float(jnp.sqrt(jnp.nanmean((student - exact) ** 2)))
  return {
    'rmse': rmse,
    'psnr': units.psnr(rmse),
    'difference': _relative_difference(student, exact),
    'ms_per_image': milliseconds['student'] / len(z),
    'sequential_ms_per_image': milliseconds['sequential'] / len(z),
    'speedup': milliseconds['sequential'] / milliseconds['student'],
  }


def cached_measurement(
  config: Config,
  workdir: epath.Path,
  model: Farmer,
  params: PyTree,
  step: int,
  labels: list[int],
  devices: mesh.LocalDevices,
) -> dict[str, Any]:
  """Returns `plan_inverse` or, for a student, `compare_student`. Measures once for a run.

  The result is stored in WORKDIR/inverse_plan.json. Other settings of the inverse, checkpoints,
  batch sizes, device kinds and shardings of the parameters need a new measurement. Process 0
  measures on its active `devices`, and all processes get the result. `model` is in its sampling
  dtype, `step` is the step of `params`, and `labels` are repeated to fill a batch. With
  inverse=sequential, and for coupling flows, which have one inverse, nothing is measured.
  """
  sampling, flow = config.sampling, config.model.flow
  if sampling.inverse == 'sequential' or flow.kind == 'coupling' or not flow.blocks:
    return {'chunk_sizes': [1] * flow.blocks, 'difference': 0.0}
  key = _plan_key(sampling, step, devices)
  file = workdir / 'inverse_plan.json'
  plans = layout.read_json(file, _are_plans) if file.exists() else {}
  if key not in plans and jax.process_index() == 0:
    logging.info('Measuring the inverse of the flow ...')
    size = devices.round_up(sampling.batch_size)
    batch, indices = devices.shard(
      (np.resize(np.asarray(labels, np.int32), size), np.arange(size, dtype=np.int32))
    )
    measure = compare_student if sampling.inverse == 'student' else plan_inverse
    z = Sampler(model, config).latents(params, batch, indices)
    plans[key] = measure(model, config, params, z, batch)
    layout.write_json(file, plans)
  processes.barrier('plan')
  plan = json.loads(file.read_text())[key]
  _log_plan(plan, config)
  return plan


def _time_alternately(calls: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, float]]:
  """Calls functions in turn. Returns their results and their shortest times in milliseconds."""
  results = {name: jax.block_until_ready(call()) for name, call in calls.items()}  # compiles
  milliseconds = dict.fromkeys(calls, float('inf'))
  for _ in range(_REPEATS):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      milliseconds[name] = min(milliseconds[name], 1e3 * (time.perf_counter() - start))
  return results, milliseconds


def _chunk_size_candidates(sampling: Sampling, num_tokens: int) -> tuple[int, ...]:
  """Returns the chunk sizes to measure. The first is 1, the reference."""
  unknown = num_tokens - 1  # The first token of a flow block does not change.
  if sampling.inverse == 'auto':
    powers = (4**power for power in range(1, unknown.bit_length()))
    return (1, *(size for size in powers if size < unknown), unknown)
  given = {'parallel': (unknown,), 'chunked': (sampling.chunk_size,)}
  return (1, *given.get(sampling.inverse, ()))


def _relative_difference(x: Array, reference: Array) -> float:
  """Returns the largest difference relative to 1 + |reference| where the reference is finite."""
  difference = abs(x - reference) / (1 + abs(reference))
  return float(jnp.where(jnp.isfinite(reference), difference, 0).max(initial=0))


def _plan_key(sampling: Sampling, step: int, devices: mesh.LocalDevices) -> str:
  name = {
    'chunked': f'chunked with chunks of {sampling.chunk_size}',
    'student': f'student with {sampling.refinement_rounds} refinement rounds',
  }.get(sampling.inverse, sampling.inverse)
  fsdp, tensor = (devices.mesh.shape[axis] for axis in ('fsdp', 'tensor'))
  return (
    f'{name}, tolerance {sampling.tolerance:g}, checkpoint {step}, batch size'
    f' {sampling.batch_size}, {jax.devices()[0].device_kind}'
    + (f', fsdp {fsdp}, tensor {tensor}' if fsdp * tensor > 1 else '')
  )


def _are_plans(value: Any) -> bool:
  return isinstance(value, dict) and all(isinstance(plan, dict) for plan in value.values())


def _log_plan(plan: dict[str, Any], config: Config) -> None:
  sampling = config.sampling
  if sampling.inverse == 'student':
    logging.info(
      f'The student is {plan["speedup"]:.1f} times faster than the sequential inverse.'
      f' The PSNR between the images of both is {plan["psnr"]:.1f} dB.'
    )
  else:
    logging.info(f'Chunk sizes of the inverse, by flow block: {plan["chunk_sizes"]}')
  # A student that removes the noise estimates the image, so that no setting makes it exact.
  if plan['difference'] > sampling.tolerance and not config.student_denoises:
    logging.warning(
      f'Samples differ from the sequential inverse by up to {plan["difference"]:.1e} relative to'
      f' 1 + |x|, which exceeds --config.sampling.tolerance={sampling.tolerance:g}.'
    )
