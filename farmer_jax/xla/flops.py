"""Number of floating-point operations (FLOPs) of the model, for the model FLOPs utilization (MFU).

Only matrix products with parameters and the products of attention are counted. Attention counts all
pairs of tokens, including the pairs that the causal mask removes.
"""

from farmer_jax import config as config_lib


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
