"""The network, and the distances over its features, against torch-fidelity's with the same weights.

The real weights are a download. Random ones, with statistics of batch normalisation that matter,
test the same arithmetic.
"""

import functools
import sys
import types

import jax
import numpy as np
import pytest

from farmer_jax import errors
from farmer_jax.evaluation import inception, torch_weights
from farmer_jax.ops import frechet, sample_quality

FEATURES = ['2048', 'logits_unbiased', 'logits']


@pytest.fixture(scope='module')
def torch():
  return pytest.importorskip('torch', exc_type=ImportError)


@pytest.fixture(scope='module')
def reference(torch):
  """torch-fidelity, with a stand-in for torchvision, which its data sets alone need."""
  parts = ('datasets', 'transforms', 'transforms.functional')
  modules = {name: types.ModuleType(name) for name in ('torchvision', *parts)}
  vars(modules['datasets']).update(dict.fromkeys(('CIFAR10', 'CIFAR100', 'STL10'), object))
  modules['torchvision'].transforms = modules['transforms']
  modules['transforms'].functional = modules['transforms.functional']
  with pytest.MonkeyPatch.context() as patch:
    for name, module in modules.items():
      patch.setitem(sys.modules, name if name == 'torchvision' else f'torchvision.{name}', module)
    yield pytest.importorskip('torch_fidelity', exc_type=ImportError)


@pytest.fixture(scope='module')
def network(torch, reference):
  """torch-fidelity's network with random weights; `network.spatial` is what TensorFlow's graph has
  at mixed_6/conv after a call."""
  extractor = reference.feature_extractor_inceptionv3
  with pytest.MonkeyPatch.context() as patch:  # No weights are downloaded or loaded.
    patch.setattr(extractor, 'load_state_dict_from_url', lambda *args, **kwargs: None)
    patch.setattr(extractor.FeatureExtractorInceptionV3, 'load_state_dict', lambda *args: None)
    network = extractor.FeatureExtractorInceptionV3('inception', FEATURES)
  generator = torch.Generator().manual_seed(0)
  for module in network.modules():
    if isinstance(module, torch.nn.Conv2d):
      torch.nn.init.kaiming_normal_(module.weight, generator=generator)
    elif isinstance(module, torch.nn.BatchNorm2d):
      module.running_mean.normal_(0, 0.2, generator=generator)
      module.running_var.uniform_(0.5, 2, generator=generator)
      module.weight.uniform_(0.5, 1.5, generator=generator)
      module.bias.normal_(0, 0.2, generator=generator)
  network.fc.bias.normal_(0, 1, generator=generator)

  def keep(module, inputs, output):
    network.spatial = output

  network.Mixed_6d.branch1x1.register_forward_hook(keep)
  return network


@pytest.fixture(scope='module')
def files(torch, network, tmp_path_factory):
  """Its weights in both formats."""
  folder = tmp_path_factory.mktemp('weights')
  for name, is_zip in (('stream', False), ('zip', True)):
    torch.save(network.state_dict(), folder / name, _use_new_zipfile_serialization=is_zip)
  return folder


@pytest.fixture(scope='module')
def extract(files):
  return compiled(files / 'stream')


def compiled(path):
  """A function of images."""
  network, params, _ = inception.load(str(path))
  return functools.partial(jax.jit(network), params)


def make_images(count, size, channels=3):
  """Coarse and fine structure, light and dark: random pixels alone would all look the same."""
  rng = np.random.default_rng(size)
  coarse = (
    rng.uniform(size=(count, 4, 4, channels)).repeat(-(-size // 4), 1).repeat(-(-size // 4), 2)
  )
  fine = rng.uniform(-0.3, 0.3, size=(count, size, size, channels))
  return (255 * np.clip(coarse[:, :size, :size] + fine, 0, 1)).astype(np.uint8)


def assert_close(found, expected):
  """To 1e-5 of the norm and of the largest magnitude; 1e-3 would do for the distances."""
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.dtype == np.float32 and found.shape == expected.shape and expected.std() > 0.1
  assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
  assert abs(found - expected).max() < 1e-5 * abs(expected).max()


@pytest.mark.parametrize('size', [64, 299])
def test_network_is_torch_fidelitys(torch, network, extract, size):
  images = make_images(2, size)
  pool, logits, biased = network(torch.from_numpy(images.transpose(0, 3, 1, 2)))
  spatial = network.spatial[:, :7].permute(0, 2, 3, 1).reshape(2, -1)
  found = extract(images)
  assert_close(found.pool, pool)
  assert_close(found.logits, logits)
  assert_close(found.spatial, spatial)
  assert found.spatial.shape == (2, 2023)
  assert not np.allclose(found.logits, biased, rtol=0.1)  # not the logits with the bias


@pytest.mark.parametrize('height,width', [(8, 31), (299, 150), (400, 700)])
def test_images_are_resized_as_by_tensorflow_1(torch, reference, height, width):
  images = make_images(2, 700)[:, :height, :width]
  module = reference.interpolate_compat_tensorflow
  expected = module.interpolate_bilinear_2d_like_tensorflow1x(
    torch.from_numpy(images.transpose(0, 3, 1, 2)).float(), (299, 299), align_corners=False
  )
  found = np.asarray(inception.resized(images)) * 128 + 128
  np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-4)


def test_resized_images_begin_at_their_corner():
  """Two pixels: the first 150 columns run from one to the other, and the rest repeat the last."""
  images = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
  found = np.asarray(inception.resized(images))
  assert found.shape == (1, 299, 299, 3)
  expected = np.minimum(np.arange(299) * 2 / 299, 1) * 255
  np.testing.assert_allclose(found[0, 7, :, 2] * 128 + 128, expected, atol=1e-4)


def test_grey_images_are_repeated_and_formats_are_equal(extract, files):
  grey = make_images(2, 32, 1)
  found = extract(grey)
  again = compiled(files / 'zip')(grey.repeat(3, -1))
  for name in ('pool', 'spatial', 'logits'):
    np.testing.assert_array_equal(getattr(found, name), getattr(again, name))
  for images in (grey[0], grey.repeat(2, -1), grey.astype(np.float32)):
    with pytest.raises(ValueError, match='images must be uint8'):
      extract(images)


def test_weights_of_something_else_are_refused(torch, network, tmp_path):
  def refused(path):
    with pytest.raises(errors.ConfigError) as caught:
      inception.load(path)
    message = str(caught.value)
    assert '\n' not in message and f'get {inception.FILE} from' in message
    assert 'github.com/mseitzer/pytorch-fid' in message
    return message

  def refused_tensors(**changes):
    tensors = {name: a for name, a in network.state_dict().items() if name not in changes}
    torch.save(tensors | {n: a for n, a in changes.items() if a is not None}, tmp_path / 'other')
    return refused(tmp_path / 'other')

  assert 'Inception-v3 needs its weights' in refused(None)
  assert 'No such file' in refused(tmp_path / 'none.pth')
  (tmp_path / 'other').write_bytes(b'<html>')
  assert 'is no PyTorch file' in refused(tmp_path / 'other')
  assert "lacks 'fc.bias';" in refused_tensors(**{'fc.bias': None})
  assert "has besides 'AuxLogits.fc.bias';" in refused_tensors(
    **{'AuxLogits.fc.bias': torch.ones(1)}
  )
  name = 'Mixed_5b.branch1x1.conv.weight'
  assert f"in other shapes '{name}';" in refused_tensors(**{name: torch.ones(192, 64, 1, 1)})
  torch.save({'fc.weight': torch.ones(1000, 2048)}, tmp_path / 'other')
  message = refused(tmp_path / 'other')
  assert 'and 468 more' in message and "in other shapes 'fc.weight'" in message


def test_counts_of_batches_may_be_missing(torch, files, network, monkeypatch):
  tensors = torch_weights.read(files / 'zip')
  assert sum(name.endswith('num_batches_tracked') for name in tensors) == 94
  kept = {name: a for name, a in tensors.items() if not name.endswith('num_batches_tracked')}
  monkeypatch.setattr(torch_weights, 'read', lambda path: kept)
  inception.load('weights')


@pytest.fixture(scope='module')
def feature_sets(torch):
  """Two sets of features that look like Inception's, and their tensors."""
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(12, 64))
  sets = []
  for count, shift, scale in ((1300, 0, 1), (1100, 0.3, 0.9)):
    latent = scale * rng.normal(size=(count, 12)) + shift
    sets.append(np.maximum(0.1 * latent @ mix + 0.3, 0).astype(np.float32))
  return sets, [torch.from_numpy(f) for f in sets]


def test_frechet_distance_is_torch_fidelitys(reference, feature_sets):
  metric = reference.metric_fid
  statistics = [metric.fid_features_to_statistics(f) for f in feature_sets[1]]
  expected = metric.fid_statistics_to_metric(*statistics, verbose=False)
  moments = [frechet.Moments.of(f) for f in feature_sets[0]]
  found = frechet.frechet_distance(*(part for m in moments for part in (m.mean, m.covariance)))
  assert expected[metric.KEY_METRIC_FID] > 0.1
  np.testing.assert_allclose(found, expected[metric.KEY_METRIC_FID], rtol=1e-3)


def test_kernel_distance_is_torch_fidelitys(reference, feature_sets):
  sets = [f.double() for f in feature_sets[1]]  # it computes in the precision of the features
  expected = reference.metric_kid.kid_features_to_metric(*sets, kid_subsets=20, verbose=False)
  found = sample_quality.kernel_distance(*feature_sets[0], subsets=20)
  np.testing.assert_allclose(found, list(expected.values()), rtol=1e-9)


@pytest.mark.parametrize('shuffled', [False, True])
def test_inception_score_is_torch_fidelitys(reference, feature_sets, shuffled):
  expected = reference.metric_isc.isc_features_to_metric(feature_sets[1][0], 7, shuffled)
  found = sample_quality.inception_score(feature_sets[0][0], 7, seed=2020 if shuffled else None)
  np.testing.assert_allclose(found, list(expected.values()), rtol=1e-9)


def test_precision_and_recall_are_torch_fidelitys(reference, feature_sets):
  # In float32 its distances, from products, put one image on the wrong side of a surface.
  real, generated = (f.double() for f in feature_sets[1])
  expected = reference.metric_prc.prc_features_to_metric(generated, real, verbose=False)
  found = sample_quality.precision_recall(*feature_sets[0], chunk=500)
  assert 0.1 < min(found) < max(found) < 0.99
  np.testing.assert_allclose(found, list(expected.values())[:2], rtol=1e-6)
