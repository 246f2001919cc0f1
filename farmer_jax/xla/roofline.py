"""Roofline of a compiled program: a lower bound of its time on one device.

Each instruction takes at least the time of its arithmetic at the peak rate, and at least the time
of its memory traffic at the bandwidth of the main memory. The bound adds the larger of the two over
all instructions. It ignores the start of kernels, partly used units and waiting. It assumes that
results pass through the main memory: a program whose arrays stay in a cache can be faster.
"""

import collections
from typing import Any

from farmer_jax.xla import arithmetic, collectives, cycles, flops, hlo, kernels, traffic

MATRIX, ATTENTION, ELEMENTWISE = 'matrix products', 'attention kernels', 'elementwise'
COPIES, OTHER = 'copies', 'other'

# Instructions that move no data, or whose traffic belongs to other instructions.
_FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'opt-barrier'),
  *('while', 'call', 'conditional', 'async-start', 'partition-id', 'replica-id', 'add-dependency'),
  *(f'{kind}{suffix}' for kind in collectives.KINDS for suffix in ('', '-start')),
}
_FREE_CALLS = 'custom_call_target="ConcatBitcast"', 'custom_call_target="AllocateBuffer"'
_COLUMNS = 'kernels', 'flops', 'bytes_read', 'bytes_written', 'seconds'
NUM_COSTLIEST = 25  # operations whose fraction of the time is reported


def bound(program: hlo.Program, cost: cycles.Cost, chip: flops.Chip) -> dict[str, Any]:
  """Returns the roofline of a program per device as a JSON-serializable dict.

  Times are None if the data sheet of the chip is incomplete. Collectives can run at the same time
  as arithmetic, so there are two bounds: `bound_seconds` with perfect overlap, and
  `bound_seconds_without_overlap`.
  """
  rates = chip.rates()
  kinds: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  operations: Any = collections.Counter()  # seconds
  for computation, instruction, times in program.executions():
    if is_free(instruction):
      continue
    count = arithmetic.count(program, computation, instruction)
    read, written = traffic.moved(program, computation, instruction)
    seconds = 0.0
    if rates:
      arithmetic_seconds = max((n / rates[rate] for rate, n in count.items()), default=0.0)
      seconds = max(arithmetic_seconds, (read + written) / rates[flops.MEMORY])
    kind = _kind(instruction, count)
    values = 1, sum(count.values()), read, written, seconds
    row = dict(zip(_COLUMNS, values, strict=True))
    kinds[kind].update({key: times * value for key, value in row.items()})
    operations[f'{kind}, {cycles.operation(instruction)}'] += times * seconds
  total = sum(kinds.values(), collections.Counter())
  seconds, links = total['seconds'], _collective_seconds(cost, chip)
  return {
    'kinds': {kind: dict(row) for kind, row in kinds.items()},
    **{key: total[key] for key in _COLUMNS[:-1]},
    'device_seconds': seconds if rates else None,
    'collective_seconds': links,
    'bound_seconds': max(seconds, links) if rates else None,
    'bound_seconds_without_overlap': seconds + links if rates else None,
    'costliest': {
      name: value / seconds for name, value in operations.most_common(NUM_COSTLIEST) if value
    },
  }


def is_free(instruction: hlo.Instruction) -> bool:
  """Returns whether an instruction does no work, or is a collective, which counts separately."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(('-done', '-update')):
    return True
  return opcode == 'custom-call' and any(call in instruction.text for call in _FREE_CALLS)


def _kind(instruction: hlo.Instruction, count: collections.Counter) -> str:
  if kernels.is_attention(instruction):
    return ATTENTION
  if set(count) - {flops.VECTOR}:
    return MATRIX
  if count[flops.VECTOR]:
    return ELEMENTWISE
  return OTHER if instruction.opcode in ('custom-call', 'sort', 'fft', 'rng') else COPIES


def _collective_seconds(cost: cycles.Cost, chip: flops.Chip) -> float:
  """Returns the time of the slowest link of each collective, or 0 if bandwidths are unknown."""
  if chip.interconnect is None:
    return 0.0
  network = chip.network or chip.interconnect
  return sum(
    times * max(local / chip.interconnect, remote / network)
    for (local, remote), times in cost.sent.items()
  )
