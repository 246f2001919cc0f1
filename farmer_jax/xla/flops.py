"""FLOPs of the model, and data sheets of accelerators, for the model FLOPs utilization (MFU).

Only matrix products with parameters and the products of attention are counted. Attention counts all
pairs of tokens, including the pairs that the causal mask removes.
"""

from typing import NamedTuple

from farmer_jax import config as config_lib

# Kinds of arithmetic and of traffic with their own rates.
DENSE, FLOAT32, EXACT_FLOAT32 = 'bfloat16', 'float32', 'exact float32'  # products of matrices
VECTOR, MEMORY = 'elementwise', 'memory'


class Chip(NamedTuple):
  """Properties of one JAX device. None means unknown."""

  peak_flops: float | None = None  # dense bfloat16 FLOP/s, without sparsity
  memory: float | None = None  # bytes
  memory_bandwidth: float | None = None  # bytes/s
  vector_flops: float | None = None  # float32 FLOP/s without the matrix units
  interconnect: float | None = None  # bytes/s that a device sends to devices of its host or slice
  network: float | None = None  # bytes/s that a GPU sends to other hosts
  clock: float | None = None  # Hz
  matrix_unit: int | None = None  # rows and columns of the matrix unit of a TPU

  def rates(self) -> dict[str, float]:
    """Returns FLOP/s of each kind of arithmetic and bytes/s, or {} if some are unknown.

    Products of float32 operands run in TensorFloat-32 on GPUs and in bfloat16 on TPUs, unless
    they are exact: with the precision HIGHEST, GPUs use no matrix units, and TPUs need six passes.
    """
    peak, memory, vector = self.peak_flops, self.memory_bandwidth, self.vector_flops
    if peak is None or memory is None or vector is None:
      return {}
    rates = {DENSE: peak, VECTOR: vector, MEMORY: memory}
    if self.matrix_unit:
      return rates | {FLOAT32: peak, EXACT_FLOAT32: peak / 6}
    return rates | {FLOAT32: peak / 2, EXACT_FLOAT32: vector}


# By the start of `jax.Device.device_kind`, which is 'TPU v5 lite' for v5e and 'TPU v5' or 'TPU v5p'
# for v5p. Sources: cloud.google.com/tpu/docs and jax-ml.github.io/scaling-book (TPUs: links in one
# direction, four ALUs in each of 1024 lanes per core; the clock of v6e follows from the cycles that
# the compiler estimates for a large product), NVIDIA's data sheets of HGX and DGX systems (GPUs:
# NVLink in one direction, and one network adapter per GPU), and for the memory that programs can
# use xla/backends/gpu/target_config of OpenXLA.
_V5E = Chip(197e12, 16 * 2**30, 0.82e12, 6.1e12, 180e9, None, 1.5e9, 128)
_CHIPS = {
  'TPU v4': Chip(275e12, 32 * 2**30, 1.2e12, 8.6e12, 270e9, None, 1.05e9, 128),
  'TPU v5 lite': _V5E,
  'TPU v5e': _V5E,
  'TPU v5': Chip(459e12, 95 * 2**30, 2.77e12, 14.3e12, 540e9, None, 1.75e9, 128),
  'TPU v6': Chip(918e12, 32 * 2**30, 1.64e12, 7.2e12, 360e9, None, 1.75e9, 256),
  'NVIDIA A100': Chip(312e12, 85.1e9, 2.04e12, 19.5e12, 300e9, 25e9),
  'NVIDIA H100 PCIe': Chip(756e12, 85.0e9, 2.04e12, 51e12, 64e9, 50e9),
  'NVIDIA H100': Chip(989e12, 84.9e9, 3.35e12, 67e12, 450e9, 50e9),
  'NVIDIA H200': Chip(989e12, 151.4e9, 4.8e12, 67e12, 450e9, 50e9),
  'NVIDIA B200': Chip(2250e12, 191.5e9, 7.7e12, 75e12, 900e9, 50e9),
}


def chip(device_kind: str) -> Chip:
  """Returns the chip whose key is the longest start of the device kind."""
  matches = [kind for kind in _CHIPS if device_kind.startswith(kind)]
  return _CHIPS[max(matches, key=len)] if matches else Chip()


def forward(config: config_lib.Config) -> int:
  """Returns the FLOPs of the log-density of one image."""
  prior = _prior(config.model, config.num_tokens, config.token_channels)
  return _flow(config, config.model.flow, _neighbors(config.model)) + prior


def training_step(config: config_lib.Config) -> int:
  """Returns the FLOPs of one training step, without recomputation that saves memory.

  A step of distillation is one pass of the teacher's flow, and training of the student.
  """
  # The backward pass takes twice the FLOPs of the forward pass.
  image = 3 * forward(config)
  if config.job == 'distill':
    flow, distill = config.model.flow, config.distill
    student = _flow(config, distill.student_flow(flow), all_tokens=distill.all_tokens)
    image = _flow(config, flow, _neighbors(config.model)) + 3 * student
  return image * config.train.batch_size


def _neighbors(model: config_lib.Model) -> int:
  """Returns the number of tokens that a causal transformer reads at each token."""
  return 4 if model.neighborhood else 1


def _flow(
  config: config_lib.Config, flow: config_lib.Flow, neighbors: int = 1, all_tokens: bool = False
) -> int:
  """Returns the FLOPs of one pass of a flow, or of a student that has the sizes `flow`.

  `neighbors` is the number of tokens that the transformers read at each token.
  """
  tokens, channels = config.num_tokens, config.token_channels
  # The tokens and the channels that the transformer of a block reads, and those that it transforms.
  inputs, read, changed = tokens - (not all_tokens), neighbors * channels, channels
  if flow.kind == 'coupling':
    inputs, read, changed = tokens, channels - channels // 2, channels // 2
  block = _transformer(config.model, flow, inputs) + _product(inputs, read, flow.width)
  return flow.blocks * (block + _product(inputs, flow.width, 2 * changed))


def _prior(model: config_lib.Model, tokens: int, channels: int) -> int:
  prior = model.prior
  if prior.kind == 'normal':
    return 0
  informative = prior.num_informative_channels(channels)
  redundant = channels - informative
  has_mixture = prior.has_redundant_mixture(channels)
  # The last token is an input only for the redundant mixture, which depends on all tokens.
  inputs = tokens if has_mixture else tokens - 1
  total = _product(inputs, _neighbors(model) * informative, prior.width)
  total += _transformer(model, prior, prior.condition_copies + inputs)
  total += _product(tokens, prior.width, prior.components * (1 + 2 * informative))
  if has_mixture:
    total += _product(1, prior.width, prior.redundant_components * (1 + 2 * redundant))
    # The density of all tokens under the redundant mixture, as two products.
    total += 2 * _product(tokens, redundant, prior.redundant_components)
  return total


def _transformer(
  model: config_lib.Model, stack: config_lib.Flow | config_lib.Prior, tokens: int
) -> int:
  width, matrices = stack.width, 3 if model.mlp == 'gated' else 2
  dense = _product(tokens, width, 4 * width)
  dense += matrices * _product(tokens, width, model.mlp_width(stack))
  return stack.layers * (dense + 2 * _product(tokens, width, tokens))


def _product(rows: int, inner: int, columns: int) -> int:
  """Returns the FLOPs of a matrix product [rows, inner] x [inner, columns]."""
  return 2 * rows * inner * columns
