"""How much arithmetic the model takes, and how much devices can do."""

# Dense bfloat16 products, FLOP/s of one device as JAX counts them, by the beginning of its kind.
# From the vendors' data sheets, without sparsity.
_PEAKS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA B200': 2250e12,
}


# Of TPUs: cycles a second, and memory in bytes.
_CLOCKS = {'TPU v4': 1.05e9, 'TPU v5 lite': 1.5e9, 'TPU v5': 1.75e9}
_MEMORY = {'TPU v4': 32 * 2**30, 'TPU v5 lite': 16 * 2**30, 'TPU v5': 95 * 2**30}


def peak(device_kind):
  """FLOP/s of a device in bfloat16, or None if it is not known."""
  return _of_kind(_PEAKS, device_kind)


def clock(device_kind):
  """Cycles a second of a device, or None."""
  return _of_kind(_CLOCKS, device_kind)


def memory(device_kind):
  """Bytes of memory of a device, or None."""
  return _of_kind(_MEMORY, device_kind)


def _of_kind(table, device_kind):
  kinds = [kind for kind in table if device_kind.startswith(kind)]
  return table[max(kinds, key=len)] if kinds else None


def forward(config):
  """FLOP that the log-density of one image takes, in matrix products, of a `config.Config`.

  Attention counts in full, as products compute it, not the half below its diagonal.
  """
  data, model = config.data, config.model
  tokens = (data.image_size // model.patch_size) ** 2
  channels = data.channels * model.patch_size**2
  flow = model.flow
  block = _transformer(flow, tokens - 1) + _product(tokens - 1, channels, flow.width)
  block += _product(tokens - 1, flow.width, 2 * channels)
  return flow.blocks * block + _prior(model.prior, tokens, channels)


def training_step(config):
  """FLOP of one training step: the backward pass takes twice the forward pass; what is computed
  again to save memory does not count."""
  return 3 * forward(config) * config.train.batch_size


def _prior(prior, tokens, channels):
  if prior.kind == 'normal':
    return 0
  informative = prior.informative_channels or channels
  redundant = channels - informative
  has_mixture = redundant > 0 and prior.redundant == 'mixture'
  read = tokens if has_mixture else tokens - 1
  total = _product(read, informative, prior.width)
  total += _transformer(prior, prior.condition_copies + read)
  total += _product(tokens, prior.width, prior.components * (1 + 2 * informative))
  if has_mixture:
    total += _product(1, prior.width, prior.redundant_components * (1 + 2 * redundant))
    # The density of all tokens under the one mixture, as two products.
    total += 2 * _product(tokens, redundant, prior.redundant_components)
  return total


def _transformer(stack, tokens):
  width, hidden = stack.width, int(stack.mlp_ratio * stack.width)
  dense = _product(tokens, width, 4 * width) + 2 * _product(tokens, width, hidden)
  return stack.layers * (dense + 2 * _product(tokens, width, tokens))


def _product(rows, inner, columns):
  return 2 * rows * inner * columns
