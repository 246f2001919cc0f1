"""The classifier learns real images, and its weights are kept."""

import numpy as np
import pytest
from etils import epath

from farmer_jax import config
from farmer_jax.data import sources
from farmer_jax.evaluation import classifier

DATA = config.Data(source='digits')


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(classifier, '_STEPS', 300)


def test_recognises_held_out_digits_and_is_trained_once(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path) / 'fidelity'
  train, valid = (sources.load(DATA, split) for split in ('train', 'valid'))
  judge = classifier.load_or_train(DATA, train, folder)
  features, classes = judge(valid.images)
  assert features.shape == (180, 128) and features.std(0).max() > 0
  assert (classes == valid.labels).mean() > 0.7  # chance: 0.1

  def never(*args):
    raise AssertionError('trained again')

  monkeypatch.setattr(classifier, '_train', never)
  again, _ = classifier.load_or_train(DATA, train, folder)(valid.images)
  np.testing.assert_array_equal(features, again)
  # Another data set is judged by another classifier.
  with pytest.raises(AssertionError, match='trained again'):
    classifier.load_or_train(config.Data(source='digits', num_classes=5), train, folder)
