"""What a compiled program says of itself: cycles and collectives, counted through its loops.

XLA's own cost analysis counts the body of a loop once. The text of a program for TPUs has an
estimate of cycles beside each fusion; the rounds of a loop stand beside it, or in its condition.
"""

import collections
import dataclasses
import math
import re

# The largest 64-bit number stands where the compiler does not know.
_NO_ESTIMATE = 2**63 - 1

_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*->.*\{$')
_COLLECTIVE = re.compile(rf'= (.*?) ({"|".join(_COLLECTIVES)})(-start)?\(')
_NAME = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_BOUND = re.compile(r'^\s+%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)')
_BELOW = re.compile(r'compare\(.*?, %?([\w.\-]+)\), direction=LT')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]')


@dataclasses.dataclass
class Cost:
  """Sums over a program, or over one of its computations."""

  cycles: int = 0  # estimated, of a device; None of collectives
  unknown_loops: int = 0  # whose rounds are not known: their bodies count once
  unknown_cycles: int = 0  # instructions of which the compiler gives no estimate
  # Cycles by the operations of the model that they are spent on.
  operations: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, other, times=1):
    """Adds what `other` comes to `times` over."""
    self.cycles += times * other.cycles
    self.unknown_loops += other.unknown_loops
    self.unknown_cycles += times * other.unknown_cycles
    for name in ('operations', 'count', 'bytes'):
      mine, its = getattr(self, name), getattr(other, name)
      for kind, value in its.items():
        mine[kind] += times * value


def cost(text):
  """The `Cost` of a compiled program, `compiled.as_text()`: collectives by kind, with the bytes of
  their results on one device."""
  computations, entry = _parse(text)
  known: dict[tuple, Cost] = {}
  # A collective that runs beside other work has parts in several fusions, all of one channel.
  lines = (line for computation in computations.values() for line in computation)
  channels: dict[str, str] = {}
  for line in lines:
    if _COLLECTIVE.search(line) and (channel := _CHANNEL.search(line)):
      channels.setdefault(channel[1], line)

  def visit(name, with_cycles):
    """The cost of a computation; without cycles inside of a fusion, whose own estimate has them."""
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
        if found and (not channel or channels[channel[1]] is line):
          total.count[found[2]] += 1
          starts = bool(found[3]) and found[2] != 'all-reduce'
          total.bytes[found[2]] += _bytes(found[1], halve=starts)
        times = _rounds(line, computations) if ' while(' in line else 1
        total.unknown_loops += times is None
        for called in _called(line):
          total.add(visit(called, with_cycles and not cycles), times or 1)
    return known[name, with_cycles]

  return visit(entry, True)


def _parse(text):
  """The lines of each computation, by name, and the name of the first to run."""
  computations: dict[str, list[str]] = {}
  entry, lines = None, []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      lines = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    elif ' = ' in line:
      lines.append(line)
  if entry is None:
    raise ValueError('this is not the text of a compiled program')
  return computations, entry


def _rounds(line, computations):
  """How often the body of a loop runs, or None. A condition that compares with a constant is that
  of a loop that counts from 0, as `jax.lax.scan` makes them."""
  known = _TRIPS.search(line)
  if known:
    return int(known[1])
  named = _CONDITION.search(line)
  condition = computations.get(named[1], ()) if named else ()
  bounds = {match[1]: match[2] for match in map(_BOUND.match, condition) if match}
  below = [match[1] for match in map(_BELOW.search, condition) if match]
  return int(bounds[below[0]]) if len(below) == 1 and below[0] in bounds else None


def _operation(line):
  """What an instruction computes, in the words of the model: the last parts of its name, and in
  which pass."""
  name = _NAME.search(line)
  if not name:
    return 'moving and converting'
  passes = {'rematted_computation': 'again', 'transpose(': 'backward', 'jvp(': 'forward'}
  which = next((word for mark, word in passes.items() if mark in name[1]), 'update')
  parts = [part for part in name[1].split('/') if not part.startswith(('jit(', 'while', 'body'))]
  return f'{which}: {"/".join(parts[-2:])}'


def _called(line):
  names = _CALLED.findall(line)
  for branches in _BRANCHES.findall(line):
    names += [name.strip().lstrip('%') for name in branches.split(',')]
  return names


def _bytes(shapes, halve):
  """Bytes of the arrays in a result's type; what starts a collective mostly returns its operands
  too, before its results, and those are left out."""
  sizes = [
    math.prod(int(n) for n in dims.split(',') if n) * _width(kind)
    for kind, dims in _ARRAY.findall(shapes)
  ]
  return sum(sizes[len(sizes) // 2 :] if halve else sizes)


def _width(kind):
  """Bytes of an element, of four bits half a one."""
  return 1 if kind == 'pred' else int(re.sub(r'\D', '', kind)) / 8
