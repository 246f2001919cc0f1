"""Reads a batch of a TFDS dataset. Checks that TensorFlow is not imported.

python -m tests.support.programs.tfds_batch DATA_DIR NAME
"""

import sys

from farmer_jax import config
from farmer_jax.data import pipeline, sources

if __name__ == '__main__':
  data = config.Data(source=sys.argv[2], path=sys.argv[1], image_size=4, num_classes=3)
  assert 'tensorflow_datasets' not in sys.modules
  source = sources.load(data, 'train')
  assert next(pipeline.TrainIterator(source, data, 2, 0))['image'].shape == (2, 4, 4, 1)
  assert 'tensorflow' not in sys.modules
