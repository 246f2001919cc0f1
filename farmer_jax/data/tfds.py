"""Data sets of TensorFlow Datasets, read from ArrayRecord files without TensorFlow."""

import dataclasses
import typing

import numpy as np

from farmer_jax.data import base, images
from farmer_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource(base.Source):
  """Examples of one split of a prepared data set, decoded when they are read."""

  dataset: str
  records: typing.Any  # random-access sequence of dicts, with the images as encoded bytes
  indices: np.ndarray  # int64 [N], the records that are part of this source
  image_key: str
  label_key: str | None
  image_size: int
  channels: int
  num_classes: int
  class_names: tuple[str, ...]

  def __len__(self):
    return len(self.indices)

  def __getitem__(self, index):
    record = int(self.indices[index])
    try:
      values = self.records[record]
      image = images.decode(values[self.image_key], self.image_size, self.channels)
    except Exception as error:  # The readers of files and records raise almost anything.
      reason = ' '.join(str(error).split()) or type(error).__name__
      raise base.BadExampleError(self.name(index), reason, 'prepare the data set again') from error
    return {'image': image, 'label': self._label(values, record)}

  def name(self, index):
    return f'example {int(self.indices[index])} of {self.dataset}'

  def _label(self, record, index):
    """The label, int32 [], or 0 where labels are not used."""
    if self.label_key is None:
      return np.int32(0)
    label = int(record[self.label_key])
    if not 0 <= label < self.num_classes:
      raise ConfigError(
        f'example {index} of {self.dataset} has the label {label}, outside of the'
        f' {self.num_classes} classes; set --config.data.num_classes=0 to train without labels'
      )
    return np.int32(label)


def load(data, split):
  """A split of the TFDS data set `data.source`: 'train', or for 'valid' `data.valid_split`.

  Of a data set that has a 'train' split alone, `data.valid_fraction` is held out. Images are
  resized and cropped as those of a folder are.

  Raises:
    ConfigError: it is unknown, not prepared, or has no such split, image or classes.
  """
  import tensorflow_datasets as tfds  # Slow to import, and of use to this source alone.

  builder = _prepared_builder(tfds, data)
  features = builder.info.features
  image_key = _image_key(tfds, features, data.source)
  label_key, class_names = _label_key(tfds, features, data)
  name, held_out = _split_name(sorted(builder.info.splits), data, split)
  # The bytes are decoded here, not by TFDS: one decoder for all sources, and one that takes CMYK.
  decoders = {image_key: tfds.decode.SkipDecoding()}
  try:
    records = builder.as_data_source(name, decoders=decoders)
  except NotImplementedError as error:
    raise ConfigError(
      f'{data.source} is prepared under {builder.data_dir} as {builder.info.file_format.value},'
      f' which has no random access; delete that folder, then run: {_prepare_command(data)}'
    ) from error
  indices = np.arange(len(records))
  if held_out:
    indices = base.part([str(index) for index in indices], np.zeros(len(indices)), data, split)
  source = TfdsSource(
    dataset=data.source,
    records=records,
    indices=indices,
    image_key=image_key,
    label_key=label_key,
    image_size=data.image_size,
    channels=data.channels,
    num_classes=data.num_classes,
    class_names=class_names,
  )
  return base.in_memory(source, data, f'reading {data.source} {name}')


def _prepared_builder(tfds, data):
  """The TFDS builder of `data.source`; ConfigError if it is unknown or not prepared."""
  try:
    builder = tfds.builder(data.source, data_dir=data.path)
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
    summary = str(error).strip().splitlines()[0].rstrip('.')
    raise ConfigError(
      f'--config.data.source={data.source} is none of digits, fashion_mnist, folder, synthetic, and'
      f' no data set of TFDS ({summary}); correct the name, or the data_dir in --config.data.path'
    ) from error
  if builder.is_prepared():
    return builder
  place = 'its data_dir'
  if data.source == 'fashion_mnist':
    place = 'a folder with the four IDX .gz files'
  raise ConfigError(
    f'TFDS data set {data.source} is not prepared under {builder.data_dir}; set --config.data.path'
    f' to {place}, or run once, with TensorFlow installed: {_prepare_command(data)}'
  )


def _prepare_command(data):
  """The shell command that downloads and prepares the data set in a format with random access."""
  folder = f', data_dir={data.path!r}' if data.path else ''
  call = f"tfds.builder('{data.source}', file_format='array_record'{folder}).download_and_prepare()"
  return f'python -c "import tensorflow_datasets as tfds; {call}"'


def _image_key(tfds, features, name):
  """The feature that holds the images: 'image', or the only one."""
  keys = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
  key = 'image' if 'image' in keys else keys[0] if len(keys) == 1 else None
  if key is None:
    raise ConfigError(
      f'TFDS data set {name} has {", ".join(keys) or "no image features"} where one image feature'
      ' is needed; choose another --config.data.source'
    )
  if features[key].np_dtype not in (np.uint8, np.uint16):
    raise ConfigError(
      f'the images of TFDS data set {name} are not of 8 or 16 bits; choose another'
      ' --config.data.source'
    )
  return key


def _label_key(tfds, features, data):
  """The feature that holds the classes ('label', or the only one) and their names; or None, ()."""
  if not data.num_classes:
    return None, ()
  keys = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
  key = 'label' if 'label' in keys else keys[0] if len(keys) == 1 else None
  count = features[key].num_classes if key else 0
  base.check_classes(data, count or 0, f'TFDS data set {data.source}')
  return key, tuple(features[key].names)


def _split_name(names, data, split):
  """The TFDS split to read, and whether a part of it is to be held out.

  Args:
    names: the splits that exist.
    data: config.Data.
    split: 'train' or 'valid'.

  Returns:
    (name, held_out): str and bool.
  """
  if 'train' not in names:
    raise ConfigError(
      f'TFDS data set {data.source} has no split called train (it has {", ".join(names)}); choose'
      ' another --config.data.source'
    )
  others = [name for name in names if name != 'train']
  if not others:
    return 'train', True
  if split == 'train':
    return 'train', False
  if data.valid_split not in others:
    raise ConfigError(
      f'--config.data.valid_split={data.valid_split} is not a validation split of {data.source};'
      f' set it to {" or ".join(others)}'
    )
  return data.valid_split, False
