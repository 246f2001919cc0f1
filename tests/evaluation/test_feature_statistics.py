"""Statistics of features, computed in batches or read from files."""

import numpy as np
import pytest
from etils import epath

from farmer_jax.evaluation import feature_networks, feature_statistics, image_sets


def apply(params, images):
  """Returns the first pixels of an image times the parameter as features."""
  flat = params['scale'] * images.reshape(len(images), -1).astype(np.float32)
  return feature_statistics.Outputs(flat[:, [0, 1]], logits=flat[:, :5], spatial=flat[:, 2:6])


@pytest.mark.parametrize('batch_size', [1, 7, 100])
def test_statistics_do_not_depend_on_the_batch_size(batch_size, tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 1), np.uint8)
  network = feature_networks.FeatureNetwork('test', apply, {'scale': np.array(0.5)}, 2, batch_size)
  image_set = image_sets.ImageSet('images', None, images.__getitem__, 23)
  statistics = network.statistics(image_set, 'images', 12)
  flat = 0.5 * images.reshape(23, -1)
  np.testing.assert_allclose(statistics.pool.mean, flat[:, :2].mean(0))
  np.testing.assert_allclose(statistics.spatial.covariance, np.cov(flat[:, 2:6].T))
  np.testing.assert_array_equal(statistics.features, flat[::2, :2])  # 12 of 23, evenly spread
  np.testing.assert_array_equal(statistics.logits, flat[:, :5])
  file = epath.Path(tmp_path) / 'statistics.npz'
  feature_statistics.save(file, statistics)
  loaded = feature_statistics.load(file, image_sets.open_npz(file))
  metrics = feature_statistics.compare(statistics, loaded, neighbors=2)
  assert abs(metrics['fid']) < 1e-6 and abs(metrics['sfid']) < 1e-6
  assert metrics['precision'] == metrics['recall'] == 1


def test_published_statistics_allow_only_frechet_distances():
  zero, one = (
    feature_statistics.load(epath.Path('x.npz'), {'mu': mean * np.ones(3), 'sigma': np.eye(3)})
    for mean in (0, 1)
  )
  assert feature_statistics.compare(zero, one) == {'fid': pytest.approx(3)}
