"""FLOPs of the model, and data sheets of accelerators, for the model FLOPs utilization (MFU).

Only matrix products with parameters and the products of attention are counted. Attention counts all
pairs of tokens, including the pairs that the causal mask removes.
"""

from typing import NamedTuple

from farmer_jax import config as config_lib


class Chip(NamedTuple):
  """Properties of one JAX device. None means unknown."""

  peak_flops: float | None = None  # dense bfloat16 FLOP/s, without sparsity
  clock: float | None = None  # Hz
  memory: float | None = None  # bytes


# By the start of `jax.Device.device_kind`, which is 'TPU v5 lite' for v5e and 'TPU v5' or 'TPU v5p'
# for v5p. --job=compile needs clock and memory for TPUs that are not attached. Sources:
# cloud.google.com/tpu/docs and NVIDIA's data sheets.
_CHIPS = {
  'TPU v4': Chip(275e12, 1.05e9, 32 * 2**30),
  'TPU v5 lite': Chip(197e12, 1.5e9, 16 * 2**30),
  'TPU v5e': Chip(197e12, 1.5e9, 16 * 2**30),
  'TPU v5': Chip(459e12, 1.75e9, 95 * 2**30),
  'TPU v6': Chip(918e12),
  'NVIDIA A100': Chip(312e12),
  'NVIDIA H100 PCIe': Chip(756e12),
  'NVIDIA H100': Chip(989e12),
  'NVIDIA H200': Chip(989e12),
  'NVIDIA B200': Chip(2250e12),
}


def chip(device_kind: str) -> Chip:
  """Returns the chip whose key is the longest start of the device kind."""
  matches = [kind for kind in _CHIPS if device_kind.startswith(kind)]
  return _CHIPS[max(matches, key=len)] if matches else Chip()


def forward(config: config_lib.Config) -> int:
  """Returns the FLOPs of the log-density of one image."""
  tokens, channels, flow = config.num_tokens, config.token_channels, config.model.flow
  block = _transformer(flow, tokens - 1) + _product(tokens - 1, channels, flow.width)
  block += _product(tokens - 1, flow.width, 2 * channels)
  return flow.blocks * block + _prior(config.model.prior, tokens, channels)


def training_step(config: config_lib.Config) -> int:
  """Returns the FLOPs of one training step, without recomputation that saves memory."""
  # The backward pass takes twice the FLOPs of the forward pass.
  return 3 * forward(config) * config.train.batch_size


def _prior(prior: config_lib.Prior, tokens: int, channels: int) -> int:
  if prior.kind == 'normal':
    return 0
  informative = prior.num_informative_channels(channels)
  redundant = channels - informative
  has_mixture = prior.has_redundant_mixture(channels)
  # The last token is an input only for the redundant mixture, which depends on all tokens.
  inputs = tokens if has_mixture else tokens - 1
  total = _product(inputs, informative, prior.width)
  total += _transformer(prior, prior.condition_copies + inputs)
  total += _product(tokens, prior.width, prior.components * (1 + 2 * informative))
  if has_mixture:
    total += _product(1, prior.width, prior.redundant_components * (1 + 2 * redundant))
    # The density of all tokens under the redundant mixture, as two products.
    total += 2 * _product(tokens, redundant, prior.redundant_components)
  return total


def _transformer(stack: config_lib.Flow | config_lib.Prior, tokens: int) -> int:
  width, hidden = stack.width, int(stack.mlp_ratio * stack.width)
  dense = _product(tokens, width, 4 * width) + 2 * _product(tokens, width, hidden)
  return stack.layers * (dense + 2 * _product(tokens, width, tokens))


def _product(rows: int, inner: int, columns: int) -> int:
  """Returns the FLOPs of a matrix product [rows, inner] x [inner, columns]."""
  return 2 * rows * inner * columns
