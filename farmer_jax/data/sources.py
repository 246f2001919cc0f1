"""All sources of images, by the name that `config.Data.source` has for them.

source = load(data, 'train')
len(source), source.class_names
source[0]            # {'image': uint8 [H, W, C], 'label': int32 []}
source.gather([0, 7])  # {'image': uint8 [2, H, W, C], 'label': int32 [2]}
"""

from farmer_jax.data import base, digits, fashion_mnist, folder, synthetic, tfds
from farmer_jax.errors import ConfigError

_LOADERS = {
  'digits': digits.load,
  'fashion_mnist': fashion_mnist.load,
  'folder': folder.load,
  'synthetic': synthetic.load,
}


def load(data, split):
  """The source that `data` describes.

  Args:
    data: config.Data. A `data.source` not listed here is the name of a TFDS data set.
    split: 'train' or 'valid'. The two are disjoint.

  Returns:
    base.Source: examples `{'image': uint8 [image_size, image_size, channels], 'label': int32 []}`,
    labels in [0, num_classes), or all 0 where num_classes is 0.

  Raises:
    ConfigError: something is wrong with the settings or with the images; one line.
  """
  if split not in base.SPLITS:
    raise ValueError(f'split must be one of {base.SPLITS}, not {split!r}')
  source = _LOADERS.get(data.source, tfds.load)(data, split)
  if not len(source):
    raise ConfigError(f'--config.data.source={data.source} has no images in its {split} split')
  return source
