"""Inception-v3 as the Fréchet inception distance defines it (arXiv 1706.08500).

This is the network of TensorFlow's graph of 2015-12-05. In contrast to the published network, the
average pools exclude the padding, and the last block has a maximum pool instead of an average pool.
Modules have the names in pytorch-fid's weight file. `convert_inception` converts this file to the
npz file that `load` reads.

Axes: B batch, H W C height, width and channels of an image, h w positions of a feature map.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from farmer_jax.errors import DataError
from farmer_jax.evaluation import feature_statistics, image_sets

NUM_FEATURES = 2048
_IMAGE_SIZE = 299
_SPATIAL_CHANNELS = 7
CHECKSUM = 'sha256'

FeatureMap = Float[Array, 'B h w C']


@functools.cache
def variable_shapes() -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the variables by path, such as `params/Mixed_5b/branch1x1/bn/scale`."""
  images = jnp.zeros((1, _IMAGE_SIZE, _IMAGE_SIZE, 3))
  variables = jax.eval_shape(Inception().init, jax.random.key(0), images)
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables, sep='/').items()}


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-256 of the names, shapes and float32 values of arrays, as hex digits."""
  digest = hashlib.sha256()
  for name in sorted(arrays):
    array = np.asarray(arrays[name], np.float32)
    digest.update(f'{name} {array.shape}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def load(path: epath.Path) -> dict[str, Any]:
  """Reads the variables of the network from an npz file that `convert_inception` wrote.

  Raises:
    DataError: the file is corrupt or belongs to another network.
  """
  shapes = variable_shapes()
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as archive:
      arrays = {name: archive[name] for name in shapes}
      expected = str(archive[CHECKSUM])
    if checksum(arrays) != expected or any(arrays[n].shape != shapes[n] for n in shapes):
      raise ValueError('its checksum or a shape does not match')
  except (*image_sets.NPZ_ERRORS, KeyError, TypeError) as error:
    raise DataError(
      f'cannot read the Inception weights {path} ({error}); write the file again with'
      ' `python -m farmer_jax.evaluation.convert_inception`'
    ) from error
  variables = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
  return traverse_util.unflatten_dict(variables, sep='/')


def extract_features(
  variables: dict[str, Any], images: UInt8[Array, 'B H W C']
) -> feature_statistics.Outputs:
  """Applies the network to images of any size. Gray images are repeated in three channels."""
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ValueError(f'images must be uint8 [B, H, W, 1 or 3], not {images.dtype} {images.shape}')
  outputs: Any = Inception().apply(variables, resize(images))
  return outputs


def resize(images: UInt8[Array, 'B H W C']) -> Float[Array, 'B 299 299 3']:
  """Resizes images to the input of the network, in [-1, 1).

  The arithmetic is the same as in TensorFlow 1's `resize_bilinear`: pixel i of the result lies at
  i · H / 299 of the image, without the usual offset of half a pixel, and large images are not
  smoothed before downsampling.
  """
  x = jnp.broadcast_to(images, (*images.shape[:-1], 3)).astype(jnp.float32)
  for axis in (2, 1):
    length = x.shape[axis]
    position = np.arange(_IMAGE_SIZE, dtype=np.float32) * np.float32(length / _IMAGE_SIZE)
    low = position.astype(np.int32)
    weight = np.expand_dims(position - low, [n for n in range(4) if n != axis])
    below, above = (x.take(index, axis) for index in (low, np.minimum(low + 1, length - 1)))
    x = below + (above - below) * weight
  return (x - 128) / 128


class Inception(nn.Module):
  """Inception-v3.

  The outputs are `pool` [B, 2048] for FID, KID, precision and recall, `logits` [B, 1008] for the
  Inception Score, and `spatial` [B, 2023] for sFID, from 17 x 17 positions and 7 channels (ADM,
  arXiv 2105.05233). The last layer has no bias, as in the code of the Inception Score's authors, in
  ADM and in torch-fidelity (`logits_unbiased`).
  """

  @nn.compact
  def __call__(self, x: Float[Array, 'B 299 299 3']) -> feature_statistics.Outputs:
    x = Unit(32, (3, 3), 2, name='Conv2d_1a_3x3')(x)
    x = Unit(32, (3, 3), padding='VALID', name='Conv2d_2a_3x3')(x)
    x = Unit(64, (3, 3), name='Conv2d_2b_3x3')(x)
    x = _max_pool_2x(x)
    x = Unit(80, name='Conv2d_3b_1x1')(x)
    x = Unit(192, (3, 3), padding='VALID', name='Conv2d_4a_3x3')(x)
    x = _max_pool_2x(x)
    x = Block(partial(_block_a, pool_channels=32), name='Mixed_5b')(x)  # 35 x 35 positions
    x = Block(partial(_block_a, pool_channels=64), name='Mixed_5c')(x)
    x = Block(partial(_block_a, pool_channels=64), name='Mixed_5d')(x)
    x = Block(_block_b, name='Mixed_6a')(x)  # 17 x 17 positions
    x = Block(partial(_block_c, width=128), name='Mixed_6b')(x)
    x = Block(partial(_block_c, width=160), name='Mixed_6c')(x)
    x = Block(partial(_block_c, width=160), name='Mixed_6d')(x)
    # TensorFlow's mixed_6/conv is the first branch: the first channels of the block's output.
    spatial = x[..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
    x = Block(partial(_block_c, width=192), name='Mixed_6e')(x)
    x = Block(_block_d, name='Mixed_7a')(x)  # 8 x 8 positions
    x = Block(partial(_block_e, pool=_average_pool), name='Mixed_7b')(x)
    x = Block(partial(_block_e, pool=_max_pool), name='Mixed_7c')(x)
    pool = x.mean((1, 2))
    logits = nn.Dense(1008, use_bias=False, precision=jax.lax.Precision.HIGHEST, name='fc')(pool)
    return feature_statistics.Outputs(pool, logits, spatial)


class Unit(nn.Module):
  """A convolution, batch normalization with running statistics, and ReLU."""

  features: int
  window: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = 'SAME'  # A convolution with stride 2 has no padding.

  @nn.compact
  def __call__(self, x: FeatureMap) -> FeatureMap:
    padding = self.padding if self.stride == 1 else 'VALID'
    precision = jax.lax.Precision.HIGHEST
    convolution = partial(nn.Conv, use_bias=False, precision=precision, name='conv')
    x = convolution(self.features, self.window, self.stride, padding)(x)
    return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name='bn')(x))


class Block(nn.Module):
  """Concatenates the channels of the branches that `branches` applies."""

  branches: Callable[[FeatureMap], list[FeatureMap]]

  @nn.compact
  def __call__(self, x: FeatureMap) -> FeatureMap:
    return jnp.concatenate(self.branches(x), -1)


def _branch(x: FeatureMap, *units: tuple[Any, ...]) -> FeatureMap:
  """Applies units (suffix of the name, number of channels, window, stride) in sequence."""
  for name, *arguments in units:
    x = Unit(*arguments, name=f'branch{name}')(x)
  return x


def _block_a(x: FeatureMap, pool_channels: int) -> list[FeatureMap]:
  return [
    _branch(x, ('1x1', 64)),
    _branch(x, ('5x5_1', 48), ('5x5_2', 64, (5, 5))),
    _branch(x, ('3x3dbl_1', 64), ('3x3dbl_2', 96, (3, 3)), ('3x3dbl_3', 96, (3, 3))),
    _branch(_average_pool(x), ('_pool', pool_channels)),
  ]


def _block_b(x: FeatureMap) -> list[FeatureMap]:
  return [
    _branch(x, ('3x3', 384, (3, 3), 2)),
    _branch(x, ('3x3dbl_1', 64), ('3x3dbl_2', 96, (3, 3)), ('3x3dbl_3', 96, (3, 3), 2)),
    _max_pool_2x(x),
  ]


def _block_c(x: FeatureMap, width: int) -> list[FeatureMap]:
  windows = (1, 1), (7, 1), (1, 7), (7, 1)
  double = [(f'7x7dbl_{number}', width, window) for number, window in enumerate(windows, 1)]
  return [
    _branch(x, ('1x1', 192)),
    _branch(x, ('7x7_1', width), ('7x7_2', width, (1, 7)), ('7x7_3', 192, (7, 1))),
    _branch(x, *double, ('7x7dbl_5', 192, (1, 7))),
    _branch(_average_pool(x), ('_pool', 192)),
  ]


def _block_d(x: FeatureMap) -> list[FeatureMap]:
  seven = ('7x7x3_1', 192), ('7x7x3_2', 192, (1, 7)), ('7x7x3_3', 192, (7, 1))
  return [
    _branch(x, ('3x3_1', 192), ('3x3_2', 320, (3, 3), 2)),
    _branch(x, *seven, ('7x7x3_4', 192, (3, 3), 2)),
    _max_pool_2x(x),
  ]


def _block_e(x: FeatureMap, pool: Callable[[FeatureMap], FeatureMap]) -> list[FeatureMap]:
  three = _branch(x, ('3x3_1', 384))
  double = _branch(x, ('3x3dbl_1', 448), ('3x3dbl_2', 384, (3, 3)))
  return [
    _branch(x, ('1x1', 320)),
    _branch(three, ('3x3_2a', 384, (1, 3))),
    _branch(three, ('3x3_2b', 384, (3, 1))),
    _branch(double, ('3x3dbl_3a', 384, (1, 3))),
    _branch(double, ('3x3dbl_3b', 384, (3, 1))),
    _branch(pool(x), ('_pool', 192)),
  ]


def _average_pool(x: FeatureMap) -> FeatureMap:
  """Averages over 3 x 3 neighbors, without the padding."""
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _max_pool(x: FeatureMap) -> FeatureMap:
  return nn.max_pool(x, (3, 3), padding='SAME')


def _max_pool_2x(x: FeatureMap) -> FeatureMap:
  return nn.max_pool(x, (3, 3), (2, 2))
