"""Sets of images from npz files, from folders of images and from data sources."""

import dataclasses
import functools
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from farmer_jax import config
from farmer_jax.data import base, sources
from farmer_jax.errors import DataError
from farmer_jax.workdir import layout

# Exceptions of NumPy for an npz file that is corrupt or has pickled objects.
NPZ_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

Gather = Callable[[Int[np.ndarray, 'B']], UInt8[np.ndarray, 'B H W C']]
Labels = Int[np.ndarray, 'n']


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """An ordered set of images. `gather(indices)` reads the images at `indices`.

  Reports show `name`. Sets of different images have different values of `identity`.
  """

  name: str
  identity: Any
  gather: Gather
  count: int
  labels: Labels | None = None

  def __len__(self) -> int:
    return self.count

  def first(self, count: int | None) -> 'ImageSet':
    """Returns the first `count` images, or all images if `count` is None or too large."""
    count = min(count or self.count, self.count)
    labels = None if self.labels is None else self.labels[:count]
    return dataclasses.replace(self, count=count, labels=labels)


def from_source(source: base.Source, name: str) -> ImageSet:
  """Returns the images of a data source."""
  labels = getattr(source, 'labels', None)
  return ImageSet(
    name, base.fingerprint(source), lambda i: source.gather(i)['image'], len(source), labels
  )


def from_path(path: str | epath.Path, data: config.Data) -> ImageSet:
  """Returns the images of an npz file, of a folder of npz files, or of a folder of image files.

  Npz files have the images in `arr_0` and, optionally, the labels in `arr_1`. Image files are
  resized and cropped to `data.image_size`.

  Raises:
    DataError: there are no images at the path, or they cannot be read.
  """
  path = layout.absolute(path)
  if not path.exists():
    raise DataError(f'{path} does not exist; it should be an npz file or a folder of images')
  # `path.glob` would read a path such as samples[1] as a pattern.
  files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix == '.npz')
  if not files:
    data = dataclasses.replace(
      data, source='folder', path=str(path), num_classes=0, valid_fraction=0.0, layout='auto'
    )
    images = from_source(sources.load(data, 'train'), path.name)
    return dataclasses.replace(images, labels=None)
  counts = [_image_count(file) for file in files]
  labels = [_labels(file, count) for file, count in zip(files, counts, strict=True)]
  known_labels = [part for part in labels if part is not None]
  return ImageSet(
    # Names of sample folders can contain dots, so `stem` would cut them.
    name=path.name.removesuffix('.npz'),
    identity=[(str(file), file.stat().length, file.stat().mtime) for file in files],
    gather=_gather_from_npz(files, np.array(counts)),
    count=sum(counts),
    labels=np.concatenate(known_labels) if len(known_labels) == len(files) else None,
  )


def open_npz(path: epath.Path) -> Any:
  """Opens an npz file. Its arrays are read on access, and pickled objects are refused."""
  try:
    return np.load(path.open('rb'), allow_pickle=False)
  except NPZ_ERRORS as error:
    raise DataError(f'cannot read {path}: {error}') from error


def _image_count(file: epath.Path) -> int:
  """Reads the number of images in an npz file from the header of `arr_0`."""
  try:
    with zipfile.ZipFile(file.open('rb')) as archive, archive.open('arr_0.npy') as member:
      np.lib.format.read_magic(member)
      shape, _, dtype = np.lib.format.read_array_header_1_0(member)
  except KeyError:
    raise DataError(
      f'{file} has neither images (arr_0) nor statistics of images (mu and sigma)'
    ) from None
  except NPZ_ERRORS as error:
    raise DataError(f'cannot read {file}: {error}') from error
  if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or not shape[0]:
    raise DataError(
      f'arr_0 of {file} is {dtype} {list(shape)}; images must be uint8 [n, H, W, 1 or 3]'
    )
  return shape[0]


def _labels(file: epath.Path, count: int) -> Labels | None:
  try:
    labels = open_npz(file).get('arr_1')
  except NPZ_ERRORS as error:
    raise DataError(f'cannot read the labels arr_1 of {file}: {error}') from error
  if labels is not None and (
    labels.shape != (count,) or labels.dtype.kind not in 'iu' or labels.min(initial=0) < 0
  ):
    raise DataError(
      f'arr_1 of {file} is {labels.dtype} {list(labels.shape)}; labels must be integers [{count}]'
      ' from 0'
    )
  return labels


def _gather_from_npz(files: list[epath.Path], counts: Int[np.ndarray, 'files']) -> Gather:
  """Returns a function that reads images. One file is in memory at a time."""
  ends = np.cumsum(counts)
  starts = ends - counts

  @functools.lru_cache(maxsize=1)
  def read(number: int) -> UInt8[np.ndarray, 'n H W C']:
    return open_npz(files[number])['arr_0']

  def gather(indices: Int[np.ndarray, 'B']) -> UInt8[np.ndarray, 'B H W C']:
    numbers = np.searchsorted(ends, indices, side='right')
    return np.stack([read(int(n))[i - starts[n]] for i, n in zip(indices, numbers, strict=True)])

  return gather
