"""Reads data sets of TensorFlow Datasets (TFDS) from ArrayRecord files without TensorFlow."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from farmer_jax import config
from farmer_jax.data import base, images
from farmer_jax.errors import ConfigError, DataError
from farmer_jax.workdir import layout


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource(base.Source):
  """Examples of one split of a prepared data set, decoded on each access."""

  data: config.Data
  records: Sequence[Mapping[str, Any]]  # images are encoded bytes
  indices: Int64[np.ndarray, 'L']  # indices of the records of this source
  image_key: str
  label_key: str | None  # None if labels are not used
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> base.Example:
    try:
      record = self.records[int(self.indices[index])]
      image = images.decode(record[self.image_key], self.data.image_size, self.data.channels)
    except Exception as error:  # The record readers raise almost any type.
      reason = ' '.join(str(error).split()) or type(error).__name__
      raise base.BadExampleError(self.name(index), reason, 'prepare the data set again') from error
    label = int(record[self.label_key]) if self.label_key else 0
    if self.label_key and not 0 <= label < self.data.num_classes:
      raise DataError(
        f'{self.name(index)} has the label {label}, outside of the {self.data.num_classes} classes;'
        ' set --config.data.num_classes=0 to train without labels'
      )
    return {'image': image, 'label': np.int32(label)}

  def name(self, index: int) -> str:
    return f'example {int(self.indices[index])} of {self.data.source}'


def load(data: config.Data, split: str) -> base.Source:
  """Loads a split of the TFDS data set `data.source`.

  'train' is the TFDS split 'train', and 'valid' is the TFDS split `data.valid_split`. If the data
  set has only a 'train' split, the fraction `data.valid_fraction` of it is held out as 'valid'.

  Raises:
    ConfigError: the data set is unknown or not prepared, or does not match `data`.
    DataError: the format has no random access, or a record that is cached in memory is unusable.
  """
  import tensorflow_datasets as tfds  # Imported here because it is slow.

  builder = _prepared_builder(tfds, data)
  features = builder.info.features
  image_key = _image_key(tfds, features, data.source)
  label_key, class_names = _label_key(tfds, features, data)
  split_names = sorted(builder.info.splits)
  name = _split_name(split_names, data, split)
  # All sources decode images with `images.decode`, which can also decode CMYK.
  decoders = {image_key: tfds.decode.SkipDecoding()}
  try:
    records = builder.as_data_source(name, decoders=decoders)
  except NotImplementedError as error:
    raise DataError(
      f'{data.source} is prepared under {builder.data_dir} as {builder.info.file_format.value},'
      ' which has no random access; run: pip install apache-beam mlcroissant tensorflow-cpu, and'
      f' then tfds convert_format --dataset_version_dir={builder.data_dir}'
      ' --out_file_format=array_record'
    ) from error
  indices = np.arange(len(records))
  if split_names == ['train']:
    indices = base.split_indices(list(map(str, indices)), np.zeros_like(indices), data, split)
  source = TfdsSource(data, records, indices, image_key, label_key, class_names)
  return base.cache_in_memory(source, data, f'reading {data.source} {name}')


def _prepared_builder(tfds: Any, data: config.Data) -> Any:
  """Returns the TFDS builder of `data.source`. Raises ConfigError unless it is prepared."""
  layout.check_no_pattern(data.path or '', '--config.data.path')
  try:
    builder = tfds.builder(data.source, data_dir=data.path and os.path.expanduser(data.path))
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
    summary = str(error).strip().splitlines()[0].rstrip('.')
    raise ConfigError(
      f'--config.data.source={data.source} is not digits, fashion_mnist, folder, synthetic or a'
      f' data set of TFDS ({summary}); correct the name, or the data_dir in --config.data.path'
    ) from error
  if builder.is_prepared():
    return builder
  is_fashion_mnist = data.source == 'fashion_mnist'
  place = 'a folder with the four IDX .gz files' if is_fashion_mnist else 'its data_dir'
  raise ConfigError(
    f'TFDS data set {data.source} is not prepared under {builder.data_dir}; set --config.data.path'
    f' to {place}, or run once, with TensorFlow installed: {_prepare_command(data)}'
  )


def _prepare_command(data: config.Data) -> str:
  """Returns the shell command that prepares the data set in a format with random access."""
  folder = f', data_dir={data.path!r}' if data.path else ''
  call = f"tfds.builder('{data.source}', file_format='array_record'{folder}).download_and_prepare()"
  return f'python -c "import tensorflow_datasets as tfds; {call}"'


def _image_key(tfds: Any, features: Mapping[str, Any], name: str) -> str:
  """Returns the name of the image feature: 'image', or the only image feature."""
  keys = _find_features(features, tfds.features.Image, 'image')
  if len(keys) != 1:
    raise ConfigError(
      f'TFDS data set {name} must have one image feature, but it has'
      f' {", ".join(keys) or "no image features"}; choose another --config.data.source'
    )
  if features[keys[0]].np_dtype not in (np.uint8, np.uint16):
    raise ConfigError(
      f'the images of TFDS data set {name} are not of 8 or 16 bits; choose another'
      ' --config.data.source'
    )
  return keys[0]


def _label_key(
  tfds: Any, features: Mapping[str, Any], data: config.Data
) -> tuple[str | None, tuple[str, ...]]:
  """Returns the class feature and its class names, or (None, ()) if labels are not used.

  The class feature is 'label', or the only class feature.
  """
  if not data.num_classes:
    return None, ()
  keys = _find_features(features, tfds.features.ClassLabel, 'label')
  feature = features[keys[0]] if len(keys) == 1 else None
  names = tuple(feature.names) if feature and feature.num_classes else ()
  base.check_num_classes(data, len(names), f'TFDS data set {data.source}')
  return keys[0], names


def _find_features(features: Mapping[str, Any], kind: type, preferred: str) -> list[str]:
  """Returns the preferred feature of a kind or, if there is none, all features of that kind."""
  keys = [key for key, feature in features.items() if isinstance(feature, kind)]
  return [preferred] if preferred in keys else keys


def _split_name(names: Sequence[str], data: config.Data, split: str) -> str:
  """Returns the name of the TFDS split to read: 'train' if it is the only split."""
  if 'train' not in names:
    raise ConfigError(
      f'TFDS data set {data.source} has no train split (it has {", ".join(names)}); choose'
      ' another --config.data.source'
    )
  others = [name for name in names if name != 'train']
  if split == 'train' or not others:
    return 'train'
  if data.valid_split in others:
    return data.valid_split
  raise ConfigError(
    f'--config.data.valid_split={data.valid_split} is not a validation split of {data.source};'
    f' set it to {" or ".join(others)}'
  )
