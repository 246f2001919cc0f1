"""Labels of samples: classes by name or index. The label `num_classes` is "no class"."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from farmer_jax import config as config_lib
from farmer_jax.errors import ConfigError, DataError


def class_label(label: str | int | None, num_classes: int, class_names: Sequence[str] = ()) -> int:
  """Returns the label of a class that is given by name or index. None means "no class".

  If no name matches exactly, case is ignored. A model without classes ignores `label`.

  Raises:
    DataError: there is no such class.
  """
  if label is None or not num_classes:
    return num_classes
  text = str(label)
  names = [name.lower() for name in class_names]
  if text in class_names or text.lower() in names:
    return class_names.index(text) if text in class_names else names.index(text.lower())
  if text.isdecimal() and int(text) < num_classes:
    return int(text)
  known = f' or a name such as {", ".join(class_names[:20])}' if class_names else ''
  raise DataError(f'there is no class {text!r}; use an index from 0 to {num_classes - 1}{known}')


def parse_labels(config: config_lib.Config, class_names: Sequence[str] = ()) -> list[int]:
  """Returns the labels in `config.sampling.labels`, by default all classes.

  Raises:
    ConfigError: `config.sampling.labels` names a class that does not exist, or "no class", which
      the model has not learned.
  """
  num_classes = config.data.num_classes
  if not config.sampling.labels:
    return list(range(num_classes)) or [0]
  words = [word.strip() for word in config.sampling.labels.split(',')]
  # A class can have the name "none".
  labels = [None if word == 'none' and word not in class_names else word for word in words]
  if None in labels:
    check_no_class(config)
  try:
    return [class_label(label, num_classes, class_names) for label in labels]
  except DataError as error:
    raise ConfigError(f'--config.sampling.labels: {error}, or none for "no class"') from error


def check_no_class(config: config_lib.Config) -> None:
  """Raises ConfigError if the model has classes and has not learned the label "no class"."""
  if config.data.num_classes and not config.model.label_dropout:
    raise ConfigError(
      'the label "no class" needs a model trained with label dropout, but'
      ' config.model.label_dropout=0; name a class for each image'
    )


def label_name(label: int, num_classes: int, class_names: Sequence[str] = ()) -> str:
  """Returns the name of a label in figures, or an empty string for "no class"."""
  if label == num_classes:
    return ''
  return class_names[label] if class_names else str(label)


def grid_labels(config: config_lib.Config) -> Int[np.ndarray, 'rows columns']:
  """Returns the labels of a sample grid: one class per row, or 0 without classes."""
  rows, columns = config.sampling.grid_rows, config.sampling.grid_columns
  num_rows = min(config.data.num_classes, rows)
  labels = np.arange(num_rows) if num_rows else np.zeros(rows)
  return np.repeat(labels.astype(np.int32)[:, None], columns, axis=1)
