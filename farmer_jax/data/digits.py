"""The 1,797 handwritten 8x8 digits that come with scikit-learn."""

import numpy as np

from farmer_jax.data import base, images


def load(data, split):
  """The digits as an in-memory source, values 0..16 stretched to 0..255.

  They have no split of their own: a fixed, stratified `data.valid_fraction` is held out.
  """
  import sklearn.datasets  # Slow to import, and of use to this source alone.

  base.check_classes(data, 10, '--config.data.source=digits')
  digits = sklearn.datasets.load_digits()
  keys = [str(index) for index in range(len(digits.target))]
  chosen = base.part(keys, digits.target, data, split)
  pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
  return base.ArraySource(
    images.from_arrays(pixels, data.image_size, data.channels),
    base.label_array(digits.target[chosen], data),
    tuple('0123456789') if data.num_classes else (),
  )
