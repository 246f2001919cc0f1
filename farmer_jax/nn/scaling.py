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
  'vector': Kind('biases, gains and scales of norms', '0, 1; mixtures: -1, 0.5', False),
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
  """Returns the optimizer of each parameter, which can be in a box: 'muon' or 'adam'."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: _rule(path, leaf, config).optimizer,
    params,
    is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata),
  )


def learning_rate_factors(params: PyTree, config: config_lib.Config) -> PyTree:
  """Returns the factor of the learning rate of each parameter of a model or of a student."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: _rule(path, leaf, config).factor, params
  )


def table(params: PyTree, config: config_lib.Config) -> str:
  """Returns a table of the kinds of parameters, with their initial values and update sizes.

  The update size is the root mean square of an update at the peak learning rate. For Adam, it is
  about the maximum: typical updates are five times smaller.
  """
  rate = config.train.optimizer.learning_rate
  counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    kind, optimizer, factor = _rule(path, leaf, config)
    divisor = math.sqrt(max(leaf.shape[-2:])) if optimizer == 'muon' else 1.0
    counts[kind, optimizer, f'{rate * factor / divisor:.2g}'] += leaf.size
  rows = [('kind', 'number', 'initial deviation', 'optimizer', 'update size', 'parameters')]
  for name, entry in KINDS.items():
    for (kind, optimizer, size), count in counts.items():
      if kind == name:
        rows.append((name, f'{count:,}', entry.initial, optimizer, size, entry.parameters))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


class _Rule(NamedTuple):
  kind: str  # key of KINDS
  optimizer: str
  factor: float  # of the learning rate


def _rule(path: Any, leaf: Any, config: config_lib.Config) -> _Rule:
  """Returns how a parameter is updated. `leaf` can be a box, which adds keys of other types."""
  names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
  if names[-1] in ('positions', 'embedding'):
    kind = 'embedding'
  elif names[-1] != 'kernel':
    kind = 'vector'
  else:
    kind = next((kind for module, kind in _KIND_OF_MODULE.items() if module in names), 'hidden')
  ratio = BASE_WIDTH / _section(names[0], config).width
  if config.train.optimizer.kind == 'muon' and KINDS[kind].muon:
    # The entries of an orthogonal matrix have a root mean square of 1 / sqrt(larger side). That of
    # Adam's updates is about 0.2 (arXiv 2502.16982). The change of an output depends on the largest
    # singular value of an update, which this factor makes independent of the width.
    shape = getattr(leaf, 'value', leaf).shape
    return _Rule(kind, 'muon', 0.2 * math.sqrt(max(shape[-2:]) * ratio))
  return _Rule(kind, 'adam', ratio if KINDS[kind].divided else 1.0)


def _section(name: str, config: config_lib.Config) -> config_lib.Flow | config_lib.Prior:
  """Returns the sizes of the transformers to which the parameters below `name` belong."""
  if name in ('student', 'alignment'):
    return config.distill.student_flow(config.model.flow)
  return config.model.prior if name == 'prior' else config.model.flow
