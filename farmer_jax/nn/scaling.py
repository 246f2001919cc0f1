"""Initial values and learning rates of all parameters, as functions of the width.

The rules are those of the maximal-update parametrization (arXiv 2203.03466): updates change the
outputs of narrow and wide models equally. Adam changes each entry of a matrix by at most about the
learning rate. The changes of the terms of an output add up, so the learning rate of a matrix that
reads hidden states is divided by the width. At `BASE_WIDTH`, Adam uses the configured learning rate
for all parameters. Muon can replace Adam for matrices inside transformer layers.
"""

import collections
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, DTypeLike, PRNGKeyArray, PyTree

from farmer_jax import config as config_lib

BASE_WIDTH = 128


class Kind(NamedTuple):
  """A kind of parameters."""

  parameters: str
  initial: str  # initial value, or its standard deviation
  divided: bool  # whether Adam's learning rate is divided by width / BASE_WIDTH
  muon: bool = False  # whether Muon can update the parameters


KINDS = {
  'input': Kind('matrices that read tokens', '1/sqrt(inputs)', False),
  'embedding': Kind('positions and classes', '0.02', False),
  'hidden': Kind('other matrices of transformer layers', '1/sqrt(inputs)', True, True),
  'residual': Kind('last matrices of residual branches', '1/sqrt(2 layers inputs)', True, True),
  'flow output': Kind('matrices to shifts and log-scales', '0', True),
  'alignment': Kind('matrices of config.distill.objective=hidden', '1/sqrt(inputs)', True),
  'mixture output': Kind('matrices to mixtures', '1/inputs', True),
  'vector': Kind('biases and scales of norms', '0, 1; mixtures: -1, 0.5', False),
}

MATRIX_INIT = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')
EMBEDDING_INIT = nn.initializers.normal(0.02)

_KIND_OF_MODULE = {
  'in_proj': 'input',
  'attention_out': 'residual',
  'mlp_out': 'residual',
  'shift_proj': 'flow output',
  'log_scale_proj': 'flow output',
  'alignment': 'alignment',
  'informative_head': 'mixture output',
  'redundant_head': 'mixture output',
}


def mixture_init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
  """Initializes matrices to mixtures. At `BASE_WIDTH`, the deviation is 0.09/sqrt(inputs).

  The first updates change hidden states along these matrices, and this change adds up over the
  width. The deviation therefore decreases with the width, not with its square root.
  """
  deviation = 0.1 * math.sqrt(BASE_WIDTH) / shape[-2]
  return nn.initializers.truncated_normal(deviation)(key, shape, dtype)


def residual_init(layers: int) -> nn.initializers.Initializer:
  """Returns the initializer of the last matrices of residual branches.

  The sum of all branches of a transformer has at most about unit variance.
  """
  return nn.initializers.variance_scaling(1 / (2 * layers), 'fan_in', 'truncated_normal')


def optimizer_of_parameters(params: PyTree, config: config_lib.Config) -> PyTree:
  """Returns the optimizer of each parameter, 'muon' or 'adam'.

  Parameters can be in boxes with the logical names of their axes.
  """

  def optimizer(path: Any, _: Any) -> str:
    return 'muon' if _uses_muon(_kind(_names(path)), config) else 'adam'

  def is_box(node: Any) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)

  return jax.tree_util.tree_map_with_path(optimizer, params, is_leaf=is_box)


def learning_rate_factors(params: PyTree, config: config_lib.Config) -> PyTree:
  """Returns the factor of the learning rate of each parameter of a model or of a student."""

  def factor(path: Any, leaf: Any) -> float:
    kind, ratio = _kind(_names(path)), BASE_WIDTH / _width(_names(path), config.model)
    if _uses_muon(kind, config):
      # The entries of an orthogonal matrix have a root mean square of 1 / sqrt(larger side). That
      # of Adam's updates is about 0.2 (arXiv 2502.16982). The change of an output depends on the
      # largest singular value of an update, which this factor makes independent of the width.
      return 0.2 * math.sqrt(max(leaf.shape[-2:]) * ratio)
    return ratio if KINDS[kind].divided else 1.0

  return jax.tree_util.tree_map_with_path(factor, params)


def table(params: PyTree, config: config_lib.Config) -> str:
  """Returns a table of the kinds of parameters, with their initial values and update sizes.

  The update size is the root mean square of an update at the peak learning rate. For Adam, it is
  about the maximum: typical updates are five times smaller.
  """
  rate, factors = config.train.optimizer.learning_rate, learning_rate_factors(params, config)
  counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
  leaves = jax.tree_util.tree_leaves_with_path(params)
  optimizers = jax.tree.leaves(optimizer_of_parameters(params, config))
  for (path, leaf), optimizer, factor in zip(
    leaves, optimizers, jax.tree.leaves(factors), strict=True
  ):
    size = rate * factor / (math.sqrt(max(leaf.shape[-2:])) if optimizer == 'muon' else 1)
    counts[_kind(_names(path)), optimizer, f'{size:.2g}'] += leaf.size
  rows = [('kind', 'number', 'initial deviation', 'optimizer', 'update size', 'parameters')]
  for name, kind in KINDS.items():
    for (other, optimizer, size), count in counts.items():
      if other == name:
        rows.append((name, f'{count:,}', kind.initial, optimizer, size, kind.parameters))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _names(path: Any) -> list[str]:
  # Boxes of parameters add keys of other types.
  return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def _kind(names: list[str]) -> str:
  if names[-1] in ('positions', 'embedding'):
    return 'embedding'
  if names[-1] != 'kernel':
    return 'vector'
  return next((kind for module, kind in _KIND_OF_MODULE.items() if module in names), 'hidden')


def _width(names: list[str], model: config_lib.Model) -> int:
  return (model.prior if names[0] == 'prior' else model.flow).width


def _uses_muon(kind: str, config: config_lib.Config) -> bool:
  return config.train.optimizer.kind == 'muon' and KINDS[kind].muon
