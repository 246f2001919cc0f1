"""Cost of a compiled program, from its HLO text: estimated cycles, and bytes of collectives.

XLA's cost analysis counts the body of a loop once. This module multiplies the cost of the body by
the trip count. The HLO text for TPUs has the compiler's estimate of cycles at each fusion, and the
trip count at each loop or in the loop's condition. The text has the format of jaxlib 0.10.2.
"""

import collections
import dataclasses
import itertools
import math
import re
import string
from collections.abc import Iterable, Mapping

# The compiler writes the largest 64-bit integer if it has no estimate.
_NO_ESTIMATE = 2**63 - 1

_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*->.*\{$')
_COLLECTIVE = re.compile(rf'= (.*?) ({"|".join(_COLLECTIVES)})(-start)?\(')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_INT_CONSTANT = re.compile(r'^\s+%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)')
_LESS_THAN = re.compile(r'compare\(.*?, %?([\w.\-]+)\), direction=LT')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]')


@dataclasses.dataclass
class Cost:
  """The cost of a program, or of one of its computations, on one device."""

  cycles: int = 0  # estimated, without collectives
  unknown_loops: int = 0  # loops without a known trip count, whose bodies count once
  unknown_cycles: int = 0  # instructions without an estimate
  # Cycles by pass and operation of the model.
  operations: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  # Number and bytes of the results of collectives, by kind.
  count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, other: 'Cost', times: int = 1) -> None:
    """Adds `times` executions of `other`."""
    self.cycles += times * other.cycles
    self.unknown_loops += other.unknown_loops
    self.unknown_cycles += times * other.unknown_cycles
    for name in ('operations', 'count', 'bytes'):
      for kind, value in getattr(other, name).items():
        getattr(self, name)[kind] += times * value


def cost(text: str) -> Cost:
  """Returns the cost of the program `compiled.as_text()`. Raises ValueError for other texts."""
  computations, entry = _parse(text)
  known: dict[tuple[str, bool], Cost] = {}
  # An asynchronous collective occurs in several fusions with one channel. The first line counts.
  first_lines: dict[str, str] = {}
  for line in itertools.chain(*computations.values()):
    if _COLLECTIVE.search(line) and (channel := _CHANNEL.search(line)):
      first_lines.setdefault(channel[1], line)

  def visit(name: str, with_cycles: bool) -> Cost:
    """Returns the cost of a computation. The estimate of a fusion includes the cycles inside."""
    if (name, with_cycles) not in known:
      known[name, with_cycles] = total = Cost()
      for line in computations.get(name, ()):
        cycles = _CYCLES.search(line)
        if cycles and int(cycles[1]) == _NO_ESTIMATE:
          total.unknown_cycles += 1
        elif cycles and with_cycles:
          total.cycles += int(cycles[1])
          total.operations[_operation(line)] += int(cycles[1])
        found, channel = _COLLECTIVE.search(line), _CHANNEL.search(line)
        if found and (not channel or first_lines[channel[1]] is line):
          total.count[found[2]] += 1
          # The start of an asynchronous collective returns its operands before its results.
          returns_operands = bool(found[3]) and found[2] != 'all-reduce'
          total.bytes[found[2]] += _num_bytes(found[1], second_half=returns_operands)
        times = _trip_count(line, computations) if ' while(' in line else 1
        total.unknown_loops += times is None
        called_names = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
          called_names += [branch.strip().lstrip('%') for branch in branches.split(',')]
        for called in called_names:
          total.add(visit(called, with_cycles and not cycles), times or 1)
    return known[name, with_cycles]

  return visit(entry, True)


def _parse(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of each computation by name, and the name of the entry computation."""
  computations: dict[str, list[str]] = {}
  entry, lines = None, []
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      lines = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    elif ' = ' in line:
      lines.append(line)
  if entry is None:
    raise ValueError('this is not the text of a compiled program')
  return computations, entry


def _trip_count(line: str, computations: Mapping[str, Iterable[str]]) -> int | None:
  """Returns the trip count of a loop, or None if it is unknown.

  A loop whose condition compares with a constant is assumed to count from 0, like `jax.lax.scan`.
  """
  if known := _TRIP_COUNT.search(line):
    return int(known[1])
  named = _CONDITION.search(line)
  condition = list(computations.get(named[1], ())) if named else []
  constants = {match[1]: match[2] for match in map(_INT_CONSTANT.match, condition) if match}
  limits = [match[1] for match in map(_LESS_THAN.search, condition) if match]
  return int(constants[limits[0]]) if len(limits) == 1 and limits[0] in constants else None


def _operation(line: str) -> str:
  """Returns the pass of an instruction, and the last two parts of its JAX name."""
  name = _OP_NAME.search(line)
  if not name:
    return 'copies and conversions'
  passes = {'rematted_computation': 'recomputed', 'transpose(': 'backward', 'jvp(': 'forward'}
  which = next((word for mark, word in passes.items() if mark in name[1]), 'update')
  parts = [part for part in name[1].split('/') if not part.startswith(('jit(', 'while', 'body'))]
  return f'{which}: {"/".join(parts[-2:])}'


def _num_bytes(result_type: str, second_half: bool) -> int:
  """Returns the bytes of the arrays in a result type, or of the second half of the arrays."""
  bits = [
    math.prod(int(n) for n in dims.split(',') if n) * int(kind.strip(string.ascii_lowercase) or 8)
    for kind, dims in _ARRAY.findall(result_type)  # kind: bf16, s4, or pred with a byte per element
  ]
  return math.ceil(sum(bits[len(bits) // 2 :] if second_half else bits) / 8)
