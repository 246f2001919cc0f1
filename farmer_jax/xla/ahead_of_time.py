"""Ahead-of-time compilation, also for devices that are not attached, and costs of programs."""

import time
from typing import Any

import jax

from farmer_jax.xla import cycles, flops, hlo, kernels, roofline, targets
from farmer_jax.xla import memory as memory_lib


def compile_and_measure(
  name: str,
  lowered: jax.stages.Lowered,
  devices: list[jax.Device],
  compiler_options: dict[str, str | bool] | None = None,
) -> dict[str, Any]:
  """Compiles a program and returns its cost per device as a JSON-serializable dict.

  TPUs: `compiler_seconds` are the compiler's estimate without waiting for collectives, and
  `kernel_seconds` those of `kernels.seconds`. Values are None if the compiler gives no estimate, or
  if the chip, which gives the clock and the memory, is unknown.

  Raises:
    JaxRuntimeError: the program needs more memory than a device has, see `memory.explained`.
  """
  chip, start = flops.chip(devices[0].device_kind), time.monotonic()
  with memory_lib.attributed(lambda: f'the {name} does not fit into the memory of a device'):
    compiled = lowered.compile(compiler_options)
  seconds = round(time.monotonic() - start, 1)
  memory = memory_lib.of_program(compiled)
  program = hlo.Program(str(compiled.as_text()))
  cost = cycles.cost(program, len(devices), targets.per_host(devices))
  return {
    'compile_seconds': seconds,
    'argument_bytes': memory.arguments,
    'temporary_bytes': memory.temporaries,
    'result_bytes': memory.results,
    'total_bytes': memory.total,
    'fits': memory.total < chip.memory if chip.memory else None,
    'collectives': {
      kind: {'count': count, 'bytes': cost.bytes[kind]} for kind, count in cost.count.items()
    },
    **_estimate(program, cost, chip),
    'loops_of_unknown_length': cost.unknown_loops,
    'instructions_without_estimate': cost.unknown_cycles,
    'costliest': {
      operation: count / cost.cycles
      for operation, count in cost.operations.most_common(roofline.NUM_COSTLIEST)
    },
    'roofline': roofline.bound(program, cost, chip),
  }


def _estimate(program: hlo.Program, cost: cycles.Cost, chip: flops.Chip) -> dict[str, Any]:
  """Returns the kernels of a program, and the seconds of the compiler and of the kernels."""
  called = kernels.calls(program)
  result: dict[str, Any] = {
    'attention_kernel': kernels.family(called),
    'kernels': dict(called),
    'estimated_cycles': cost.cycles or None,
    **dict.fromkeys(('compiler_seconds', 'kernel_seconds', 'estimated_seconds')),
  }
  if chip.clock and cost.cycles:
    seconds, unknown = kernels.seconds(program, chip)
    compiler = cost.cycles / chip.clock
    result |= {'compiler_seconds': compiler, 'kernel_seconds': seconds}
    result |= {'estimated_seconds': compiler + seconds, 'kernels_without_estimate': unknown}
  return result


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
  lines += [f'  attention: {program["attention_kernel"]}', *_describe_times(program)]
  if loops := program['loops_of_unknown_length']:
    lines.append(f'  loops of unknown length, which count once: {loops}')
  return '\n'.join(lines)


def _describe_times(program: dict[str, Any]) -> list[str]:
  """Describes the estimated time and the roofline, as far as they are known."""
  lines, limits = [], program['roofline']
  if program['estimated_seconds']:
    parts = [program[f'{part}_seconds'] * 1e3 for part in ('compiler', 'kernel', 'estimated')]
    lines.append(
      f'  estimated time, without waiting for collectives or data: {parts[0]:.1f} ms by the'
      f' compiler + {parts[1]:.1f} ms by a model of the attention kernels = {parts[2]:.1f} ms'
      + _mfu(program, 'estimated_mfu')
    )
    if program['kernels_without_estimate']:
      lines.append(f'  kernels without an estimate: {program["kernels_without_estimate"]} calls')
  if limits['device_seconds'] is not None:
    overlapped, serial = limits['bound_seconds'], limits['bound_seconds_without_overlap']
    lines.append(
      f'  lower bound of the time (roofline, not an estimate): {overlapped * 1e3:.1f} ms'
      f'{_mfu(limits, "bound_mfu")}; if collectives do not overlap: {serial * 1e3:.1f} ms'
      f'{_mfu(limits, "bound_mfu_without_overlap")}'
    )
    lines += [
      f'    {kind}: {row["seconds"] * 1e3:.1f} ms ({row["kernels"]} kernels,'
      f' {row["flops"] / 1e12:.2f} TFLOP, {row["bytes_read"] / 2**30:.1f} GiB read,'
      f' {row["bytes_written"] / 2**30:.1f} GiB written)'
      for kind, row in sorted(limits['kinds'].items(), key=lambda item: -item[1]['seconds'])
    ]
    lines.append(f'    collectives: {limits["collective_seconds"] * 1e3:.1f} ms')
  if decoding := program.get('decoding'):
    seconds = decoding['bound_seconds_per_image']
    bound = '' if seconds is None else f'; at least {seconds * 1e3:.2f} ms per image'
    read = decoding['bytes_read_per_token'] / 2**20
    lines.append(f'  memory read on each device per token: {read:.1f} MiB{bound}')
  return lines


def _mfu(values: dict[str, Any], key: str) -> str:
  return f' ({values[key]:.0%} MFU)' if key in values else ''
