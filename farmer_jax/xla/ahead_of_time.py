"""Ahead-of-time compilation, also for devices that are not attached, and costs of programs."""

import os
import time
from typing import Any

import jax

from farmer_jax import errors
from farmer_jax.xla import flops, hlo

# Number of operations whose fraction of the time is reported.
_COSTLIEST_OPERATIONS = 25


def topology_devices(topology: str | None) -> list[jax.Device]:
  """Returns the devices of a TPU slice such as v5e:16x16, or the attached devices for None.

  Raises:
    ConfigError: there is no such slice, or libtpu is missing.
  """
  if topology is None:
    return jax.devices()
  from jax.experimental import topologies

  # libtpu must neither wait for a metadata server nor lock a device.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  try:
    return topologies.get_topology_desc(topology, platform='tpu').devices
  except Exception as error:  # The type depends on the cause: no libtpu, or an unknown name.
    raise errors.ConfigError(
      f'cannot compile for --config.compile.topology={topology} ({_one_line(error)}); use a name'
      ' such as v5e:16x16, and install the compiler: pip install "farmer_jax[tpu]"'
    ) from error


def compile_and_measure(
  name: str,
  lowered: jax.stages.Lowered,
  device_kind: str,
  compiler_options: dict[str, str | bool] | None = None,
) -> dict[str, Any]:
  """Compiles a program and returns its cost per device as a JSON-serializable dict.

  The compiler estimates cycles without waiting for collectives. Values are None if the chip, which
  gives the clock and the memory, is unknown.

  Raises:
    ConfigError: the program needs more memory than a device has.
  """
  chip, start = flops.chip(device_kind), time.monotonic()
  try:
    compiled = lowered.compile(compiler_options)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise errors.ConfigError(
      f'the {name} does not fit into the memory of a device ({_one_line(error)}); use a smaller'
      ' --config.train.batch_size (sampling: --config.sampling.batch_size), a larger'
      ' --config.mesh.fsdp or another --config.model.remat'
    ) from error
  seconds = round(time.monotonic() - start, 1)
  memory: Any = compiled.memory_analysis()
  cost = hlo.cost(str(compiled.as_text()))
  # Donated results reuse the memory of the arguments.
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
  return {
    'compile_seconds': seconds,
    'argument_bytes': memory.argument_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'result_bytes': results,
    'total_bytes': total,
    'fits': total < chip.memory if chip.memory else None,
    'collectives': {
      kind: {'count': count, 'bytes': cost.bytes[kind]} for kind, count in cost.count.items()
    },
    'estimated_cycles': cost.cycles or None,
    'estimated_seconds': cost.cycles / chip.clock if chip.clock and cost.cycles else None,
    'loops_of_unknown_length': cost.unknown_loops,
    'instructions_without_estimate': cost.unknown_cycles,
    'costliest': {
      operation: cycles / cost.cycles
      for operation, cycles in cost.operations.most_common(_COSTLIEST_OPERATIONS)
    },
  }


def describe(name: str, program: dict[str, Any]) -> str:
  """Describes a result of `compile_and_measure` in a few lines of text."""
  gib = {key: program[f'{key}_bytes'] / 2**30 for key in ('total', 'argument', 'temporary')}
  fits = {None: '', True: '; it fits', False: '; IT DOES NOT FIT'}[program['fits']]
  lines = [
    f'{name}: compiled in {program["compile_seconds"]:.0f} s',
    f'  memory per device: {gib["total"]:.2f} GiB (arguments {gib["argument"]:.2f}, temporaries'
    f' {gib["temporary"]:.2f}){fits}',
  ]
  lines += [
    f'  {kind}: {found["count"]} calls, {found["bytes"] / 2**30:.2f} GiB in total'
    for kind, found in program['collectives'].items()
  ]
  if program['estimated_seconds']:
    mfu = f', {program["estimated_mfu"]:.0%} MFU' if 'estimated_mfu' in program else ''
    lines.append(
      '  estimated time, without waiting for collectives or data:'
      f' {program["estimated_seconds"] * 1e3:.1f} ms{mfu}'
    )
  return '\n'.join(lines)


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:200]
