"""FLOPs of an instruction by the rate of the unit that executes them."""

import collections
import re

from farmer_jax.xla import flops, hlo, kernels, traffic

_CUBLAS_DIMENSIONS = re.compile(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]')
_LABELS = re.compile(r'dim_labels=(\w+)_(\w+)->(\w+)')
# As attributes of a product, and in the settings of cuBLAS.
_EXACT = re.compile(r'operand_precision(?:=\{highest|":\s*\["HIGHEST")')
_WINDOW = re.compile(r'window=\{([^}]*)\}')


def count(
  program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction
) -> collections.Counter:
  """Returns the FLOPs of an instruction, by the keys of `flops.Chip.rates`.

  A product of matrices has two FLOPs per pair of factors, also inside a fusion. Elementwise
  instructions have one per element that is needed, and reductions one per element that they read.
  Scalars, which are mostly indices of slices, do not count.
  """
  inner = program.get(instruction.called('calls') or '')
  if inner is None:
    return _count(traffic.Usage(program, computation, instruction), instruction)
  usage = traffic.Usage(program, inner)
  total: collections.Counter = collections.Counter()
  for member in inner.values():
    total += count(program, inner, member) if member.opcode == 'fusion' else _count(usage, member)
  return total


def _count(usage: traffic.Usage, instruction: hlo.Instruction) -> collections.Counter:
  opcode, operands = instruction.opcode, usage.computation.operands(instruction)
  if opcode == 'dot':
    contracted = instruction.numbers('lhs_contracting_dims')
    return _products(instruction, operands, contracted)
  if opcode == 'custom-call' and '"__cublas$' in instruction.text:
    found = _CUBLAS_DIMENSIONS.search(instruction.text)
    contracted = [int(n) for n in re.findall(r'\d+', found[1])] if found else []
    return _products(instruction, operands, contracted)
  if opcode == 'convolution':
    return collections.Counter({_rate(instruction, operands): _convolution(instruction, operands)})
  if kernel := kernels.attention(usage.computation, instruction):
    return collections.Counter({flops.DENSE: kernel.needed_flops})
  if opcode in ('reduce', 'reduce-window') and usage.needed(instruction):
    elements = sum(operand.elements for operand in operands[: len(operands) // 2])
    return collections.Counter({flops.VECTOR: elements})
  if opcode in traffic.ARITHMETIC and instruction.elements > 1:
    return collections.Counter({flops.VECTOR: usage.needed(instruction)})
  return collections.Counter()


def _products(
  instruction: hlo.Instruction, operands: list[hlo.Instruction], contracted: list[int]
) -> collections.Counter:
  total = 2 * instruction.results[0].elements
  for axis in contracted:
    total *= operands[0].results[0].dims[axis]
  return collections.Counter({_rate(instruction, operands): total})


def _rate(instruction: hlo.Instruction, operands: list[hlo.Instruction]) -> str:
  """Returns the rate of a product, by the dtype of its operands and its precision."""
  if all(operand.results[0].item_bytes < 4 for operand in operands[:2]):
    return flops.DENSE
  return flops.EXACT_FLOAT32 if _EXACT.search(instruction.text) else flops.FLOAT32


def _convolution(instruction: hlo.Instruction, operands: list[hlo.Instruction]) -> int:
  """Returns the FLOPs of a convolution. On TPUs, every matrix product is one.

  XLA expresses a batch of products as a window over the batch axis that covers one element of its
  input and otherwise padding, which costs nothing. This function counts the elements.
  """
  labels = _LABELS.search(instruction.text)
  if not labels:
    return 0
  inputs, kernel = (operand.results[0].dims for operand in operands[:2])
  output = instruction.results[0].dims
  total = 2 * output[labels[3].index('b')] * output[labels[3].index('f')]
  total *= kernel[labels[2].index('i')]
  window = _WINDOW.search(instruction.text)
  settings = dict(part.split('=') for part in window[1].split()) if window else {}
  for axis, size in enumerate(settings.get('size', '').split('x') if settings else ()):
    pick = {name: value.split('x')[axis] for name, value in settings.items()}
    steps = {name: int(pick.get(name, 1)) for name in ('stride', 'lhs_dilate', 'rhs_dilate')}
    low = int(pick.get('pad', '0_0').split('_')[0])
    length = (inputs[labels[1].index(str(axis))] - 1) * steps['lhs_dilate'] + 1
    positions = (
      start * steps['stride'] + offset * steps['rhs_dilate'] - low
      for start in range(output[labels[3].index(str(axis))])
      for offset in range(int(size))
    )
    total *= sum(0 <= p < length and p % steps['lhs_dilate'] == 0 for p in positions)
  return total
