"""The classifier learns real images, and its weights are kept."""

import numpy as np
import pytest
from etils import epath

from farmer_jax import config
from farmer_jax.data import sources
from farmer_jax.evaluation import classifier

DATA = config.Data(source='digits')


@pytest.fixture(autouse=True)
def short(monkeypatch, optimized):
  monkeypatch.setattr(classifier, '_BATCH', 64)
  monkeypatch.setattr(classifier, '_STEPS', 400)
  with optimized():
    yield


def test_recognises_held_out_digits_and_is_trained_once(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path) / 'fidelity'
  train, valid = (sources.load(DATA, split) for split in ('train', 'valid'))
  network, params, identity = classifier.load_or_train(DATA, train, folder, 1)
  outputs = network(params, valid.images)
  assert outputs.pool.shape == (180, classifier.CHANNELS) and outputs.pool.std(0).max() > 0
  assert (outputs.logits.argmax(-1) == valid.labels).mean() > 0.7  # chance: 0.1

  def never(*args):
    raise AssertionError('trained again')

  monkeypatch.setattr(classifier, '_train', never)
  network, params, same = classifier.load_or_train(DATA, train, folder, 1)
  np.testing.assert_array_equal(outputs.pool, network(params, valid.images).pool)
  assert same == identity
  # Damaged weights are made again.
  (file,) = folder.iterdir()
  file.write_bytes(file.read_bytes()[:-2000])
  with pytest.raises(AssertionError, match='trained again'):
    classifier.load_or_train(DATA, train, folder, 1)
  # Another data set is judged by another classifier.
  with pytest.raises(AssertionError, match='trained again'):
    classifier.load_or_train(DATA, train, folder, 2)
