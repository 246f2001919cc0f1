"""Bytes that an instruction reads from and writes to the main memory of a device.

A fusion reads its operands and writes its results, and nothing in between. A loop over slices of
stacked arrays passes the whole arrays to a fusion, which reads or writes one slice. `Usage` finds
out how much of an operand a fusion needs; otherwise the arrays would count once per iteration.
"""

from farmer_jax.xla import hlo

SLICES = 'dynamic-slice', 'slice', 'gather'
_UPDATES = {'dynamic-update-slice': 1, 'scatter': -1}  # position of the operand with the new values
# Instructions that need an element of each operand for an element of the result.
ARITHMETIC = {
  *('add', 'subtract', 'multiply', 'divide', 'remainder', 'negate', 'abs', 'sign', 'clamp', 'map'),
  *('maximum', 'minimum', 'compare', 'select', 'is-finite', 'and', 'or', 'xor', 'not', 'power'),
  *('exponential', 'exponential-minus-one', 'log', 'log-plus-one', 'sqrt', 'rsqrt', 'cbrt', 'erf'),
  *('tanh', 'logistic', 'sine', 'cosine', 'tan', 'atan2', 'floor', 'ceil', 'round-nearest-afz'),
  *('round-nearest-even', 'shift-left', 'shift-right-logical', 'shift-right-arithmetic'),
}
_ONE_TO_ONE = ARITHMETIC | {
  *('convert', 'bitcast', 'bitcast-convert', 'copy', 'transpose', 'reshape', 'reverse'),
  *('reduce-precision', 'get-tuple-element'),
}


class Usage:
  """How many elements of each result in a computation are needed, at most all.

  Args:
    program: the program.
    computation: the computation of a fusion, or one that contains `instruction`.
    instruction: the only instruction that counts. None: the instructions of a fusion.
  """

  def __init__(
    self,
    program: hlo.Program,
    computation: hlo.Computation,
    instruction: hlo.Instruction | None = None,
  ):
    self.program, self.computation = program, computation
    self._alone = instruction is not None
    self._needed = {instruction.name: instruction.elements} if instruction else {}

  def needed(self, instruction: hlo.Instruction) -> int:
    """Returns how many elements of the result of an instruction are needed."""
    if instruction.name not in self._needed:
      count = instruction.elements
      if not instruction.is_root:
        users = self.computation.users[instruction.name]
        count = min(count, sum(self.operand(user, position) for user, position in users))
      self._needed[instruction.name] = count
    return self._needed[instruction.name]

  def operand(self, user: hlo.Instruction, position: int) -> int:
    """Returns how many elements of an operand an instruction needs."""
    elements, needed = self.computation[user.operands[position]].elements, self.needed(user)
    if user.opcode in SLICES and position == 0:
      return min(elements, needed)
    if user.opcode in _UPDATES and position == 0:
      return 0 if self._in_place(user) else needed
    if user.opcode in _ONE_TO_ONE and user.elements == elements:
      return needed
    if needed and (inner := self._inside(user)):
      return inner.needed(inner.computation.parameters[position])
    return elements if needed else 0

  def written(self, result: hlo.Instruction) -> int:
    """Returns the bytes that are written for the result of an instruction."""
    operands = self.computation.operands(result)
    if not self._alone and result.opcode == 'tuple':
      return sum(map(self.written, operands))
    if not self._alone and result.opcode == 'bitcast' and operands:
      return self.written(operands[0])
    if inner := self._inside(result):
      return inner.written(inner.computation.root)
    if result.opcode in _UPDATES and self._in_place(result):
      update = operands[_UPDATES[result.opcode]]
      return 0 if result.results[0].space else update.bytes
    return sum(array.bytes for array in result.results if not array.space)

  def _inside(self, instruction: hlo.Instruction) -> 'Usage | None':
    """Returns the usage inside a fusion, or None if the instruction is none."""
    if instruction.opcode != 'fusion':
      return None
    return Usage(self.program, self.program[instruction.called('calls') or ''])

  def _in_place(self, update: hlo.Instruction) -> bool:
    """Returns whether an update changes an array that exists outside the fusion."""
    source = self.computation[update.operands[0]]
    while source.opcode == 'bitcast':
      source = self.computation[source.operands[0]]
    return self._alone or (source.opcode == 'parameter' and self._is_result(update))

  def _is_result(self, instruction: hlo.Instruction) -> bool:
    users = [user for user, _ in self.computation.users[instruction.name]]
    return instruction.is_root or (
      bool(users) and all(u.opcode in ('bitcast', 'tuple') and self._is_result(u) for u in users)
    )


def moved(
  program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction
) -> tuple[float, float]:
  """Returns the bytes that an instruction outside fusions reads and writes in the main memory."""
  operands = computation.operands(instruction)
  if instruction.opcode.endswith('-start'):  # an asynchronous copy: operands, result and a flag
    target = instruction.results[0 if instruction.opcode == 'copy-start' else 1]
    written = 0 if target.space else target.bytes
    return _read(operands[0], target.elements), written
  usage = Usage(program, computation, instruction)
  # An operand that occurs twice is read once.
  reads = {o.name: _read(o, usage.operand(instruction, i)) for i, o in enumerate(operands)}
  return sum(reads.values()), usage.written(instruction)


def _read(operand: hlo.Instruction, elements: int) -> float:
  """Returns the bytes of some elements of an operand, or 0 if it is in a fast memory."""
  if any(array.space for array in operand.results) or not operand.elements:
    return 0
  return operand.bytes * elements / operand.elements
