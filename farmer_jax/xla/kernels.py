"""Attention kernels of a compiled program: which ones run, their FLOPs, and their time on TPUs.

XLA does not see inside a kernel and estimates no cycles for it. `seconds` is a model of the time of
JAX's splash attention on a TPU, not a measurement. The scores between a block of queries and a
block of keys take

* matrix products on the matrix unit, a square of `Chip.matrix_unit` rows and columns. A product
  contracts over the width of a head, or has results of this width. A width that is no multiple of
  the unit's size uses a part of the unit and takes the time of the next multiple.
* elementwise operations and exponentials on the vector unit, which computes four operations or one
  exponential at a time in each lane. Both run at the same time.
* memory traffic: keys and values of each block (for the gradient of keys and values: queries and
  their gradients), and all other operands and results once. The last axis is padded to 128 lanes.

A block's products wait for its exponentials, so these two times add up. Memory traffic overlaps
with both. Blocks above the diagonal of a causal mask are skipped, and blocks on the diagonal count
completely.
"""

import collections
import re
from typing import NamedTuple

from farmer_jax.xla import flops, hlo

_CUDNN = '__cudnn$fmha'
_TPU = 'custom_call_target="tpu_custom_call"'
_NAME = re.compile(r'/([\w.\-]+)/pallas_call"')
_SPLASH = re.compile(r'splash_m[hq]a_(fwd|dq|dkv)')
_CUDNN_SCORES = re.compile(r'"intermediate_tensor_shape".*?"dimensions":\s*\[([^\]]*)\]')
_SEQ_MINOR = re.compile(r'q_layout\\*": 2')  # The layouts of q, k and v are equal here.
_LANES = 128
# Products and elementwise operations for each score, with one exponential in addition. Elementwise:
# mask (3), maximum, difference, factor of the exponential, sum, conversion; in the backward pass
# mask (3), difference, factor, difference and product of the gradients, conversions.
_PRODUCTS = {'fwd': 2, 'dq': 3, 'dkv': 4, 'fused': 5}
_ELEMENTWISE = {'fwd': 8, 'dq': 8, 'dkv': 9, 'fused': 10}
_OPERATIONS_PER_EXPONENTIAL = 4


class Attention(NamedTuple):
  """One call of an attention kernel on one device."""

  needed_flops: float  # of the scores that the mask keeps
  width: int = 1  # of a head
  products: float = 0  # FLOPs of all blocks that run
  scores: float = 0  # number of scores in these blocks
  elementwise: float = 0  # operations on the scores
  bytes: float = 0

  def seconds(self, chip: flops.Chip) -> float:
    """Returns the time on a TPU by the model of this module."""
    rates, size = chip.rates(), chip.matrix_unit or 1
    products = self.products * -(-self.width // size) * size / self.width / rates[flops.DENSE]
    operations = max(self.elementwise, _OPERATIONS_PER_EXPONENTIAL * self.scores)
    return max(products + operations / rates[flops.VECTOR], self.bytes / rates[flops.MEMORY])


def name(instruction: hlo.Instruction) -> str | None:
  """Returns the name of the kernel that an instruction calls, for example cudnn, or None."""
  if instruction.opcode != 'custom-call':
    return None
  if _CUDNN in instruction.text:
    return 'cudnn backward' if f'{_CUDNN}SoftmaxBackward' in instruction.text else 'cudnn'
  if _TPU in instruction.text:
    found = _NAME.search(instruction.text)
    return found[1] if found else instruction.name
  return None


def is_attention(instruction: hlo.Instruction) -> bool:
  """Returns whether an instruction calls a known attention kernel."""
  found = name(instruction) or ''
  return found.startswith('cudnn') or bool(_SPLASH.match(found))


def calls(program: hlo.Program) -> collections.Counter:
  """Returns the number of calls of each kernel."""
  found: collections.Counter = collections.Counter()
  for _, instruction, times in program.executions():
    if kernel := name(instruction):
      found[kernel] += times
  return found


def family(names: collections.Counter) -> str:
  """Returns the attention kernels of a program: cudnn, splash, or xla if there are none."""
  kinds = ('cudnn', 'splash')
  return next((kind for kind in kinds if any(name.startswith(kind) for name in names)), 'xla')


def seconds(program: hlo.Program, chip: flops.Chip) -> tuple[float, int]:
  """Returns the modelled time of a TPU program's kernels, and how many calls have no model."""
  total, unknown = 0.0, 0
  for computation, instruction, times in program.executions():
    if _TPU in instruction.text:
      kernel = attention(computation, instruction)
      unknown += times * (kernel is None)
      total += times * kernel.seconds(chip) if kernel else 0
  return total, unknown


def attention(computation: hlo.Computation, instruction: hlo.Instruction) -> Attention | None:
  """Returns the work of an attention kernel, or None if the instruction calls no known one."""
  kernel, operands = name(instruction) or '', computation.operands(instruction)
  if kernel.startswith('cudnn'):
    return Attention(_cudnn_flops(instruction, operands))
  phase = _SPLASH.match(kernel)
  return _splash(phase[1], computation, instruction, operands) if phase else None


def _cudnn_flops(instruction: hlo.Instruction, operands: list[hlo.Instruction]) -> float:
  found = _CUDNN_SCORES.search(instruction.text)
  batch, heads, queries, keys = (int(n) for n in re.findall(r'\d+', found[1])) if found else [0] * 4
  scores = batch * heads * queries * keys
  if '"mask_type": "CAUSAL"' in instruction.text:
    scores = batch * heads * (queries * keys - queries * (queries - 1) // 2)
  width = operands[0].elements // max(1, batch * heads * queries)
  return 2 * width * scores * (5 if 'SoftmaxBackward' in instruction.text else 2)


def _splash(
  phase: str,
  computation: hlo.Computation,
  instruction: hlo.Instruction,
  operands: list[hlo.Instruction],
) -> Attention:
  """Returns the work of a kernel of JAX's splash attention."""
  # The first floating-point operands are the queries [..., h, n, D], the keys and the values. With
  # the layout SEQ_MINOR they are [..., h, D, n].
  arrays = [operand.results[0] for operand in operands]
  q, k = [array for array in arrays if array.dtype.startswith(('bf', 'f'))][:2]
  (*lead, queries, width), keys = q.dims, k.dims[-2]
  minor_tokens = _SEQ_MINOR.search(instruction.text) is not None
  if minor_tokens:
    queries, width, keys = width, queries, k.dims[-1]
  heads = hlo.Array('pred', tuple(lead)).elements
  results = [a for a in instruction.results if a.dtype == q.dtype and len(a.dims) >= len(q.dims)]
  # The fused backward kernel also returns the gradient of the queries.
  fused = phase == 'dkv' and len(results) > 2
  suffix = '' if phase == 'fwd' else f'_{phase}'
  block_q, block_kv = _blocks(instruction.text, suffix, min(512, queries), min(512, keys))
  blocks = heads * _visible_blocks(computation, instruction, queries // block_q, keys // block_kv)
  scores = blocks * block_q * block_kv
  padded = (width if minor_tokens else -(-width // _LANES) * _LANES) * q.item_bytes
  streamed = block_kv, keys
  if phase == 'dkv':
    streamed = block_q, queries
  traffic = sum(_padded_bytes(array) for array in [*arrays, *instruction.results])
  traffic += 2 * padded * (blocks * streamed[0] - heads * streamed[1])
  products, work = (table['fused' if fused else phase] for table in (_PRODUCTS, _ELEMENTWISE))
  return Attention(
    needed_flops=2 * products * width * heads * (queries * keys - queries * (queries - 1) // 2),
    width=width,
    products=2 * products * scores * width,
    scores=scores,
    elementwise=work * scores,
    bytes=traffic,
  )


def _blocks(text: str, suffix: str, *defaults: int) -> tuple[int, int]:
  """Returns the block sizes of queries and keys, which the kernel's metadata names."""
  found = [re.search(rf'block_{axis}{suffix}\\*": (\d+)', text) for axis in ('q', 'kv')]
  q, kv = (int(m[1]) if m else size for m, size in zip(found, defaults, strict=True))
  return q, kv


def _visible_blocks(
  computation: hlo.Computation, instruction: hlo.Instruction, rows: int, columns: int
) -> float:
  """Returns the number of blocks of a head that run.

  The second operand marks each block with 0 if the mask hides it. The text omits large constants;
  the mask is then assumed to be causal. In coupling flows it is not, and half of the blocks are
  missing.
  """
  marks = computation.get(instruction.operands[1])
  while marks and marks.opcode in ('copy-done', 'copy-start', 'copy', 'bitcast'):
    marks = computation.get(marks.operands[0])
  if marks and marks.opcode == 'constant' and '...' not in marks.inputs:
    found = re.findall(r'\d+', marks.inputs)
    return sum(mark != '0' for mark in found) * rows * columns / len(found)
  # Block row i sees the keys up to its last query.
  return sum(min(columns, -(-(i + 1) * columns // rows)) for i in range(rows))


def _padded_bytes(array: hlo.Array) -> float:
  """Returns the bytes of an array whose last axis is padded to the number of lanes."""
  last = array.dims[-1] if array.dims else 1
  return array.bytes * -(-last // _LANES) * _LANES / last
