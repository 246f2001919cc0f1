"""The compiler's cost of a program: estimated cycles, and bytes of collectives.

XLA's cost analysis counts the body of a loop once. This module multiplies the cost of the body by
the trip count. The text for TPUs has the compiler's estimate of cycles at each fusion.
"""

import collections
import dataclasses
import itertools
import re

from farmer_jax.xla import collectives, hlo

# The compiler writes the largest 64-bit integer if it has no estimate.
_NO_ESTIMATE = 2**63 - 1

_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r'(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)')


@dataclasses.dataclass
class Cost:
  """The cost of a program on one device."""

  cycles: int = 0  # estimated, without collectives
  unknown_loops: int = 0  # loops without a known trip count, whose bodies count once
  unknown_cycles: int = 0  # instructions without an estimate
  # Cycles by pass and operation of the model.
  operations: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  # Number and bytes of the results of collectives, by kind.
  count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  # Number of collectives by the bytes that a device sends, in all and to other hosts.
  sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def cost(program: hlo.Program, num_devices: int = 1, per_host: int | None = None) -> Cost:
  """Returns the cost of a program for `num_devices`, with `per_host` of them in each host."""
  total = Cost()
  # An asynchronous collective occurs in several fusions with one channel. The first one counts.
  parsed: dict[hlo.Instruction, collectives.Collective] = {}
  channels = set()
  for instruction in itertools.chain(*(computation.values() for computation in program.values())):
    found = collectives.parse(instruction, num_devices, per_host or num_devices)
    channel = collectives.channel(instruction)
    if found and (channel is None or channel not in channels):
      parsed[instruction] = found
      channels.add(channel)

  def visit(computation: hlo.Computation, times: int, with_cycles: bool) -> None:
    """Adds executions of a computation. The estimate of a fusion includes the cycles inside."""
    for instruction in computation.values():
      cycles = _CYCLES.search(instruction.text)
      if cycles and int(cycles[1]) == _NO_ESTIMATE:
        total.unknown_cycles += times
      elif cycles and with_cycles:
        total.cycles += times * int(cycles[1])
        total.operations[operation(instruction)] += times * int(cycles[1])
      if instruction in parsed:
        kind, result_bytes, *sent = parsed[instruction]
        total.count[kind] += times
        total.bytes[kind] += times * result_bytes
        total.sent[tuple(sent)] += times
      trips = program.trip_count(instruction) if instruction.opcode == 'while' else 1
      total.unknown_loops += trips is None
      called = program.called(instruction)
      called += [program[name] for name in _CALLED.findall(instruction.text) if name in program]
      for inner in {id(c): c for c in called}.values():
        visit(inner, times * (trips or 1), with_cycles and not cycles)

  visit(program.entry, 1, True)
  return total


def operation(instruction: hlo.Instruction) -> str:
  """Returns the pass of an instruction, and the last two parts of its JAX name."""
  name = _OP_NAME.search(instruction.text)
  if not name:
    return 'copies and conversions'
  passes = {'rematted_computation': 'recomputed', 'transpose(': 'backward', 'jvp(': 'forward'}
  which = next((word for mark, word in passes.items() if mark in name[1]), 'update')
  parts = [part for part in name[1].split('/') if not part.startswith(('jit(', 'while', 'body'))]
  return f'{which}: {"/".join(parts[-2:])}'
