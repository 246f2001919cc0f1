"""The text of a compiled program as data: computations, instructions, arrays and trip counts.

The text has the format of jaxlib 0.10.2, for CPUs, GPUs and TPUs.
"""

import dataclasses
import functools
import math
import re
import string
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*->.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r' ?([\w\-]+)\(')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+)\w*\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?')
_OPERAND = re.compile(r'%?([\w.\-]+)(?:,|$)')
_COMMENT = re.compile(r'/\*.*?\*/')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


class Array(NamedTuple):
  """Type of an array on one device."""

  dtype: str  # bf16, f32, s4, pred, ...
  dims: tuple[int, ...]
  space: int = 0  # 0: the main memory of the device

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def item_bytes(self) -> float:
    """Bytes of an element. An element of type pred takes one byte."""
    return int(self.dtype.strip(string.ascii_lowercase) or 8) / 8

  @property
  def bytes(self) -> int:
    return math.ceil(self.elements * self.item_bytes)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One instruction. `text` has the attributes after the operands."""

  name: str
  opcode: str
  results: tuple[Array, ...]  # of a nested tuple, all arrays in the order of the text
  inputs: str  # operands, or the value of a constant
  text: str
  is_root: bool

  @functools.cached_property
  def operands(self) -> list[str]:
    """Names of the operands. A constant, a parameter and some others have none."""
    return [] if self.opcode in ('constant', 'parameter') else _OPERAND.findall(self.inputs)

  @property
  def elements(self) -> int:
    return sum(array.elements for array in self.results)

  @property
  def bytes(self) -> int:
    return sum(array.bytes for array in self.results)

  def called(self, attribute: str) -> str | None:
    """Returns the computation that an attribute such as `calls` or `body` names."""
    found = re.search(rf'\b{attribute}=%?([\w.\-]+)', self.text)
    return found[1] if found else None

  def numbers(self, attribute: str) -> list[int]:
    """Returns the integers of an attribute such as `dimensions={0,1}`."""
    found = re.search(rf'\b{attribute}=\{{([\d,]*)\}}', self.text)
    return [int(n) for n in found[1].split(',') if n] if found else []


class Computation(dict[str, Instruction]):
  """The instructions of a computation by name, in the order in which they run."""

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """Returns the instructions whose results are the operands."""
    return [self[name] for name in instruction.operands if name in self]

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    """Returns the parameters in the order of the operands of a call."""
    found = [i for i in self.values() if i.opcode == 'parameter']
    return sorted(found, key=lambda i: int(i.inputs))

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.values() if i.is_root)

  @functools.cached_property
  def users(self) -> dict[str, list[tuple[Instruction, int]]]:
    """Returns by name the instructions that use a result, and the position of the operand."""
    found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self}
    for user in self.values():
      for position, name in enumerate(user.operands):
        if name in found:
          found[name].append((user, position))
    return found


class Program(dict[str, Computation]):
  """The computations of a compiled program by name."""

  def __init__(self, text: str):
    """Parses `compiled.as_text()`. Raises ValueError for other texts."""
    super().__init__()
    entry, current, block = None, None, ''
    for line in text.splitlines():
      if current is None:
        if header := _COMPUTATION.match(line):
          current = self[header[2]] = Computation()
          entry = header[2] if header[1] else entry
        continue
      # Attributes of an instruction can contain line breaks.
      if _INSTRUCTION.match(line) or line == '}':
        _add(current, block)
        block = line
      else:
        block += line
      if line == '}':
        current, block = None, ''
    if entry is None:
      raise ValueError('this is not the text of a compiled program')
    self.entry = self[entry]

  def trip_count(self, loop: Instruction) -> int | None:
    """Returns the trip count of a loop, or None if it is unknown.

    A loop whose condition compares with a constant is assumed to count from 0, like
    `jax.lax.scan`.
    """
    if known := _TRIP_COUNT.search(loop.text):
      return int(known[1])
    condition = self.get(loop.called('condition') or '', Computation())
    limits = [
      limit
      for i in condition.values()
      if i.opcode == 'compare' and 'direction=LT' in i.text
      for limit in condition.operands(i)[-1:]
    ]
    if len(limits) == 1 and limits[0].opcode == 'constant':
      return int(limits[0].inputs)
    return None

  def called(self, instruction: Instruction) -> list[Computation]:
    """Returns the computations that a loop, call, conditional or asynchronous call runs.

    All branches of a conditional are returned. The computations of a fusion, and those that a
    reduction applies to pairs of numbers, are not.
    """
    if instruction.opcode not in ('while', 'call', 'conditional', 'async-start'):
      return []
    attributes = 'body', 'to_apply', 'calls', 'true_computation', 'false_computation'
    names = [name for a in attributes if (name := instruction.called(a))]
    for branches in _BRANCHES.findall(instruction.text):
      names += [branch.strip().lstrip('%') for branch in branches.split(',')]
    return [self[name] for name in names if name in self]

  def executions(
    self, computation: Computation | None = None, times: int = 1
  ) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields each instruction outside fusions, its computation, and how often it runs.

    The body of a loop of unknown length runs once.
    """
    computation = self.entry if computation is None else computation
    for instruction in computation.values():
      yield computation, instruction, times
      trips = self.trip_count(instruction) if instruction.opcode == 'while' else 1
      for called in self.called(instruction):
        yield from self.executions(called, times * (1 if trips is None else trips))


def _add(computation: Computation, line: str) -> None:
  """Adds the instruction of a line, if there is one."""
  found = _INSTRUCTION.match(line)
  if not found:
    return
  end = _closing(line, found.end()) if line.startswith('(', found.end()) else None
  end = line.find(' ', found.end()) if end is None else end
  opcode = _OPCODE.match(line, end)
  if not opcode:
    return
  close = _closing(line, opcode.end() - 1)
  computation[found[2]] = Instruction(
    name=found[2],
    opcode=opcode[1],
    results=arrays(line[found.end() : end]),
    inputs=_COMMENT.sub('', line[opcode.end() : close - 1]),
    text=line[close:],
    is_root=bool(found[1]),
  )


def _closing(line: str, start: int) -> int:
  """Returns the position after the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(line, start):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.end()
  return len(line)


def arrays(types: str) -> tuple[Array, ...]:
  """Returns the arrays in the text of a type."""
  return tuple(
    Array(dtype, tuple(int(n) for n in dims.split(',') if n), int(space or 0))
    for dtype, dims, space in _ARRAY.findall(types)
  )
