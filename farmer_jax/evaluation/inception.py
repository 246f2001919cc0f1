"""Inception-v3 as the Fréchet inception distance defines it (arXiv 1706.08500): the network of
TensorFlow's graph of 2015-12-05, with its weights as pytorch-fid ported them.

That graph differs from the published network: its average pools leave the padding out, and the last
block has a maximum where others average. Modules are named as in the file of weights.
"""

import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from farmer_jax.errors import ConfigError
from farmer_jax.evaluation import feature_statistics, torch_weights

FILE = 'pt_inception-2015-12-05-6726825d.pth'

CHANNELS = 2048  # features of an image

_SIDE = 299
_SPATIAL_CHANNELS = 7
_SOURCE = (
  f'get {FILE} from the release fid_weights of github.com/mseitzer/pytorch-fid and give its path'
)

# Names that a message lists before it counts.
_NAMES_SHOWN = 3


def load(path):
  """The network with the weights in a file.

  Args:
    path: of pytorch-fid's file of weights.

  Returns:
    network(params, uint8 [B, H, W, C]) -> `feature_statistics.Outputs`, grey images standing for grey ones in
    colour; its params; and what tells these weights from others, in characters.

  Raises:
    ConfigError: `path` is None, there is no such file, or it has other tensors than the network.
  """
  if path is None:
    raise ConfigError(f'Inception-v3 needs its weights: {_SOURCE}')
  try:
    variables = _variables(path, torch_weights.read(path))
  except ConfigError as error:
    raise ConfigError(f'{error}; {_SOURCE}') from error
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(variables):
    digest.update(np.asarray(leaf).tobytes())
  return _look, variables, digest.hexdigest()


def _look(variables, images):
  """The network on images of any size."""
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ValueError(f'images must be uint8 [B, H, W, 1 or 3], not {images.dtype} {images.shape}')
  return Inception().apply(variables, resized(images))


def resized(images):  # uint8 [B, H, W, 1 or 3]
  """What the network takes: float32 [B, 299, 299, 3], from -1 on to just below 1.

  As TensorFlow 1's `resize_bilinear`: pixel i of the result lies at i · H / 299 of the image, not
  at the centre of its part of it, and nothing is smoothed before it is made smaller.
  """
  x = jnp.broadcast_to(images, (*images.shape[:-1], 3)).astype(jnp.float32)
  for axis in (2, 1):
    length = x.shape[axis]
    position = np.arange(_SIDE, dtype=np.float32) * np.float32(length / _SIDE)
    low = position.astype(np.int32)
    weight = np.expand_dims(position - low, [n for n in range(4) if n != axis])
    below, above = (x.take(index, axis) for index in (low, np.minimum(low + 1, length - 1)))
    x = below + (above - below) * weight
  return (x - 128) / 128


class Inception(nn.Module):
  """The network, from `resized` images to `feature_statistics.Outputs`, float32: `pool` [B, 2048], of FID,
  KID, precision and recall; `logits` [B, 1008], of the Inception Score; `spatial` [B, 2023], of
  sFID: 17 x 17 positions, 7 channels (ADM, arXiv 2105.05233)."""

  @nn.compact
  def __call__(self, x):  # [B, 299, 299, 3]
    """The logits are the Inception Score's: its authors' code, ADM's and torch-fidelity's
    (`logits_unbiased`) multiply by the weights of the last layer and leave its bias out."""
    x = Unit(32, (3, 3), 2, name='Conv2d_1a_3x3')(x)
    x = Unit(32, (3, 3), padding='VALID', name='Conv2d_2a_3x3')(x)
    x = Unit(64, (3, 3), name='Conv2d_2b_3x3')(x)
    x = _halved(x)
    x = Unit(80, name='Conv2d_3b_1x1')(x)
    x = Unit(192, (3, 3), padding='VALID', name='Conv2d_4a_3x3')(x)
    x = _halved(x)
    x = BlockA(32, name='Mixed_5b')(x)
    x = BlockA(64, name='Mixed_5c')(x)
    x = BlockA(64, name='Mixed_5d')(x)
    x = BlockB(name='Mixed_6a')(x)
    x = BlockC(128, name='Mixed_6b')(x)
    x = BlockC(160, name='Mixed_6c')(x)
    x = BlockC(160, name='Mixed_6d')(x)
    # TensorFlow's mixed_6/conv: the first branch, which the block's result begins with.
    spatial = x[..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
    x = BlockC(192, name='Mixed_6e')(x)
    x = BlockD(name='Mixed_7a')(x)
    x = BlockE('average', name='Mixed_7b')(x)
    x = BlockE('max', name='Mixed_7c')(x)
    pool = x.mean((1, 2))  # [B, CHANNELS]
    logits = nn.Dense(1008, use_bias=False, precision=jax.lax.Precision.HIGHEST, name='fc')(pool)
    return feature_statistics.Outputs(pool, logits, spatial)


class Unit(nn.Module):
  """A convolution, batch normalisation by running statistics, and ReLU."""

  features: int
  window: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x):  # [B, h, w, C]
    """Returns [B, h, w, features]; with a stride of 2 there is no padding."""
    x = nn.Conv(
      self.features,
      self.window,
      self.stride,
      padding=self.padding if self.stride == 1 else 'VALID',
      use_bias=False,
      precision=jax.lax.Precision.HIGHEST,
      name='conv',
    )(x)
    return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name='bn')(x))


class BlockA(nn.Module):
  """35 x 35 positions."""

  pool_features: int

  @nn.compact
  def __call__(self, x):  # [B, 35, 35, C]
    """Returns [B, 35, 35, 224 + pool_features]."""
    one = Unit(64, name='branch1x1')(x)
    five = Unit(48, name='branch5x5_1')(x)
    five = Unit(64, (5, 5), name='branch5x5_2')(five)
    three = Unit(64, name='branch3x3dbl_1')(x)
    three = Unit(96, (3, 3), name='branch3x3dbl_2')(three)
    three = Unit(96, (3, 3), name='branch3x3dbl_3')(three)
    pool = Unit(self.pool_features, name='branch_pool')(_averaged(x))
    return jnp.concatenate([one, five, three, pool], -1)


class BlockB(nn.Module):
  """From 35 x 35 positions to 17 x 17."""

  @nn.compact
  def __call__(self, x):  # [B, 35, 35, C]
    """Returns [B, 17, 17, 480 + C]."""
    three = Unit(384, (3, 3), 2, name='branch3x3')(x)
    double = Unit(64, name='branch3x3dbl_1')(x)
    double = Unit(96, (3, 3), name='branch3x3dbl_2')(double)
    double = Unit(96, (3, 3), 2, name='branch3x3dbl_3')(double)
    return jnp.concatenate([three, double, _halved(x)], -1)


class BlockC(nn.Module):
  """17 x 17 positions."""

  width: int

  @nn.compact
  def __call__(self, x):  # [B, 17, 17, C]
    """Returns [B, 17, 17, 768]."""
    one = Unit(192, name='branch1x1')(x)
    seven = Unit(self.width, name='branch7x7_1')(x)
    seven = Unit(self.width, (1, 7), name='branch7x7_2')(seven)
    seven = Unit(192, (7, 1), name='branch7x7_3')(seven)
    double = Unit(self.width, name='branch7x7dbl_1')(x)
    double = Unit(self.width, (7, 1), name='branch7x7dbl_2')(double)
    double = Unit(self.width, (1, 7), name='branch7x7dbl_3')(double)
    double = Unit(self.width, (7, 1), name='branch7x7dbl_4')(double)
    double = Unit(192, (1, 7), name='branch7x7dbl_5')(double)
    pool = Unit(192, name='branch_pool')(_averaged(x))
    return jnp.concatenate([one, seven, double, pool], -1)


class BlockD(nn.Module):
  """From 17 x 17 positions to 8 x 8."""

  @nn.compact
  def __call__(self, x):  # [B, 17, 17, C]
    """Returns [B, 8, 8, 512 + C]."""
    three = Unit(192, name='branch3x3_1')(x)
    three = Unit(320, (3, 3), 2, name='branch3x3_2')(three)
    seven = Unit(192, name='branch7x7x3_1')(x)
    seven = Unit(192, (1, 7), name='branch7x7x3_2')(seven)
    seven = Unit(192, (7, 1), name='branch7x7x3_3')(seven)
    seven = Unit(192, (3, 3), 2, name='branch7x7x3_4')(seven)
    return jnp.concatenate([three, seven, _halved(x)], -1)


class BlockE(nn.Module):
  """8 x 8 positions."""

  pool: str  # 'average' or 'max'

  @nn.compact
  def __call__(self, x):  # [B, 8, 8, C]
    """Returns [B, 8, 8, 2048]."""
    one = Unit(320, name='branch1x1')(x)
    three = Unit(384, name='branch3x3_1')(x)
    three = [
      Unit(384, (1, 3), name='branch3x3_2a')(three),
      Unit(384, (3, 1), name='branch3x3_2b')(three),
    ]
    double = Unit(448, name='branch3x3dbl_1')(x)
    double = Unit(384, (3, 3), name='branch3x3dbl_2')(double)
    double = [
      Unit(384, (1, 3), name='branch3x3dbl_3a')(double),
      Unit(384, (3, 1), name='branch3x3dbl_3b')(double),
    ]
    pooled = nn.max_pool(x, (3, 3), padding='SAME') if self.pool == 'max' else _averaged(x)
    pool = Unit(192, name='branch_pool')(pooled)
    return jnp.concatenate([one, *three, *double, pool], -1)


def _averaged(x):
  """Means of 3 x 3 neighbours, of fewer at the edges."""
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _halved(x):
  return nn.max_pool(x, (3, 3), (2, 2))


def _variables(path, tensors):
  """The network's variables, of the tensors in a file; ConfigError where they do not fit."""
  images = jnp.zeros((1, _SIDE, _SIDE, 3))
  template = jax.eval_shape(Inception().init, jax.random.key(0), images)
  leaves, tree = jax.tree.flatten_with_path(template)
  names = [_file_name([key.key for key in place]) for place, _ in leaves]
  # PyTorch has the window's axes last, and those of features the other way round.
  axes = [{4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[leaf.ndim] for _, leaf in leaves]
  shapes = {
    name: tuple(leaf.shape[axis] for axis in np.argsort(order))
    for name, order, (_, leaf) in zip(names, axes, leaves, strict=True)
  }
  _check(path, tensors, shapes | {'fc.bias': (1008,)})
  arrays = [tensors[name].transpose(order) for name, order in zip(names, axes, strict=True)]
  return jax.tree.unflatten(tree, [jnp.asarray(array, jnp.float32) for array in arrays])


def _file_name(path):
  """The name in the file of the variable at a path such as params/Mixed_5b/branch1x1/bn/scale."""
  leaf = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
  return '.'.join([*path[1:-1], leaf.get(path[-1], path[-1])])


def _check(path, tensors, shapes):
  """ConfigError unless the file has these tensors, of these shapes. PyTorch's count of the batches
  it saw may be there or not."""
  found = {n: a.shape for n, a in tensors.items() if not n.endswith('.num_batches_tracked')}
  problems = {
    'lacks': shapes.keys() - found.keys(),
    'has besides': found.keys() - shapes.keys(),
    'has in other shapes': {n for n in shapes.keys() & found.keys() if shapes[n] != found[n]},
  }
  found_wrong = [f'{what} {_listed(names)}' for what, names in problems.items() if names]
  if found_wrong:
    raise ConfigError(f'{path} is not {FILE}: it {", ".join(found_wrong)}')


def _listed(names):
  """Some of the names, each on one line and not too long for it."""
  shown = ' and '.join(repr(name[:40]) for name in sorted(names)[:_NAMES_SHOWN])
  return f'{shown} and {len(names) - _NAMES_SHOWN} more' if len(names) > _NAMES_SHOWN else shown
