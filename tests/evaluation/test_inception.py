"""Inception equals torch-fidelity's network with the same weights. Unusable files are refused.

The weights are random, because the published weights would have to be downloaded.
"""

import functools
import sys
import types

import jax
import numpy as np
import pytest
from absl import app
from etils import epath

from farmer_jax import errors
from farmer_jax.evaluation import convert_inception, feature_networks, inception
from farmer_jax.ops import sample_quality

FEATURES = ['2048', 'logits_unbiased', 'logits']


@pytest.fixture(scope='module')
def torch():
  return pytest.importorskip('torch', exc_type=ImportError)


@pytest.fixture(scope='module')
def reference(torch):
  """torch-fidelity with a stub for torchvision, which only its datasets need."""
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
  """torch-fidelity's network with random weights.

  After a call, `network.spatial` is the output of mixed_6/conv in the TensorFlow graph.
  """
  extractor = reference.feature_extractor_inceptionv3
  with pytest.MonkeyPatch.context() as patch:  # Prevents the download of weights.
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
  branch = network.Mixed_6d.branch1x1
  branch.register_forward_hook(lambda module, inputs, output: setattr(network, 'spatial', output))
  return network


@pytest.fixture(scope='module')
def weights(torch, network, tmp_path_factory):
  """A PyTorch file of the weights, and the npz file to which it is converted."""
  folder = epath.Path(tmp_path_factory.mktemp('weights'))
  torch.save(network.state_dict(), folder / 'weights.pth')
  convert_inception.convert(folder / 'weights.pth', folder / 'weights.npz')
  return folder / 'weights.pth', folder / 'weights.npz'


@pytest.fixture(scope='module')
def extract(weights):
  return functools.partial(jax.jit(inception.extract_features), inception.load(weights[1]))


def make_images(count, size, channels=3):
  """Returns images with coarse and fine structure. Noise images would have similar features."""
  rng = np.random.default_rng(size)
  scale = -(-size // 4)
  coarse = rng.uniform(size=(count, 4, 4, channels)).repeat(scale, 1).repeat(scale, 2)
  fine = rng.uniform(-0.3, 0.3, size=(count, size, size, channels))
  return (255 * np.clip(coarse[:, :size, :size] + fine, 0, 1)).astype(np.uint8)


def assert_close(result, expected):
  """Asserts equality within 1e-5 of the norm and of the largest value. FID needs only 1e-3."""
  result, expected = np.asarray(result), np.asarray(expected)
  assert result.dtype == np.float32 and result.shape == expected.shape and expected.std() > 0.1
  assert np.linalg.norm(result - expected) < 1e-5 * np.linalg.norm(expected)
  assert abs(result - expected).max() < 1e-5 * abs(expected).max()


# The network.


@pytest.mark.parametrize('size', [299, pytest.param(64, marks=pytest.mark.slow)])
def test_network_equals_torch_fidelity(torch, network, extract, size):
  images = make_images(2, size)
  pool, logits, logits_with_bias = network(torch.from_numpy(images.transpose(0, 3, 1, 2)))
  spatial = network.spatial[:, :7].permute(0, 2, 3, 1).reshape(2, -1)
  outputs = extract(images)
  assert_close(outputs.pool, pool)
  assert_close(outputs.logits, logits)
  assert_close(outputs.spatial, spatial)
  assert outputs.pool.shape == (2, inception.NUM_FEATURES) and outputs.spatial.shape == (2, 2023)
  assert not np.allclose(outputs.logits, logits_with_bias, rtol=0.1)


@pytest.mark.parametrize('height,width', [(8, 31), (299, 150), (400, 700)])
def test_resize_equals_tensorflow_1(torch, reference, height, width):
  images = make_images(2, 700)[:, :height, :width]
  module = reference.interpolate_compat_tensorflow
  expected = module.interpolate_bilinear_2d_like_tensorflow1x(
    torch.from_numpy(images.transpose(0, 3, 1, 2)).float(), (299, 299), align_corners=False
  )
  result = np.asarray(inception.resize(images)) * 128 + 128
  np.testing.assert_allclose(result, expected.permute(0, 2, 3, 1), atol=1e-4)


def test_resize_interpolates_from_the_corner():
  """Columns 0 … 149 interpolate between two pixels, and the other columns are constant."""
  images = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
  result = np.asarray(inception.resize(images))
  assert result.shape == (1, 299, 299, 3)
  expected = np.minimum(np.arange(299) * 2 / 299, 1) * 255
  np.testing.assert_allclose(result[0, 7, :, 2] * 128 + 128, expected, atol=1e-4)


def test_gray_images_are_repeated_and_other_arrays_refused(extract):
  gray = make_images(2, 64, 1)
  np.testing.assert_array_equal(inception.resize(gray), inception.resize(gray.repeat(3, -1)))
  for images in (gray[0], gray.repeat(2, -1), gray.astype(np.float32)):
    with pytest.raises(ValueError, match='uint8'):
      extract(images)


# Files of weights.


class Hostile:
  """Creates a file when it is unpickled."""

  def __reduce__(self):
    return open, ('unpickled', 'w')


@pytest.fixture
def folder(tmp_path):
  return epath.Path(tmp_path)


def refused(action, *arguments, error=errors.DataError, names=()):
  with pytest.raises(error) as caught:
    action(*arguments)
  message = str(caught.value)
  assert '\n' not in message and all(name in message for name in names)


def test_converter_command_writes_the_file(weights, tmp_path, capsys):
  target = tmp_path / 'new' / 'inception.npz'
  convert_inception.main(['convert_inception', weights[0], target])
  assert str(target) in capsys.readouterr().out
  assert np.load(target)['sha256'] == np.load(weights[1])['sha256']
  with pytest.raises(SystemExit, match='error: .*missing.pth'):
    convert_inception.main(['convert_inception', tmp_path / 'missing.pth', target])
  with pytest.raises(app.UsageError):
    convert_inception.main(['convert_inception'])


def test_pytorch_file_is_converted_once_for_a_run(weights, folder, monkeypatch):
  load = functools.partial(feature_networks.load_inception, folder=folder, batch_size=8)
  network = load(str(weights[0]))
  monkeypatch.setitem(sys.modules, 'torch', None)  # `import torch` raises ImportError.
  for path in weights:
    assert load(str(path)).identity == network.identity
  assert len(list(folder.iterdir())) == 1
  (folder / 'other.pth').write_bytes(b'PK')
  names = 'other.pth', 'farmer_jax.evaluation.convert_inception', 'config.fidelity.weights'
  refused(load, str(folder / 'other.pth'), error=errors.ConfigError, names=names)


def test_missing_weights_are_refused(folder):
  load = functools.partial(feature_networks.load_inception, folder=folder, batch_size=8)
  names = 'config.fidelity.weights', convert_inception.PYTORCH_FILE
  refused(load, None, error=errors.ConfigError, names=names)
  for file in ('missing.pth', 'missing.npz'):
    refused(load, str(folder / file), names=[file])


def test_pickled_objects_are_not_loaded(torch, folder, monkeypatch):
  monkeypatch.chdir(folder)
  path, target = folder / 'hostile.pth', folder / 'x.npz'
  for content in (Hostile(), {'fc.weight': Hostile()}, [torch.ones(1)], {'fc.weight': 1}):
    for zipped in (True, False):
      torch.save(content, path, _use_new_zipfile_serialization=zipped)
      refused(convert_inception.convert, path, target, names=['hostile.pth'])
  np.savez(target, **{'params/fc/kernel': np.array([Hostile()], object)})
  refused(inception.load, target, names=['x.npz'])
  assert not (folder / 'unpickled').exists()


def test_damaged_and_foreign_pytorch_files_are_refused(torch, network, weights, folder):
  path, target = folder / 'other.pth', folder / 'x.npz'
  for content in (b'<html>', b'', weights[0].read_bytes()[:-100_000]):
    path.write_bytes(content)
    refused(convert_inception.convert, path, target, names=['other.pth'])
  kernel = 'Mixed_5b.branch1x1.conv.weight'
  one = torch.ones(1)
  for changes in ({'fc.bias': None}, {'AuxLogits.fc.bias': one}, {kernel: one}):
    tensors = network.state_dict() | changes
    torch.save({name: t for name, t in tensors.items() if t is not None}, path)
    refused(convert_inception.convert, path, target, names=['other.pth', *changes])
  torch.save({'fc.weight': torch.ones(1000, 2048)}, path)
  refused(convert_inception.convert, path, target, names=["'fc.weight'", '468 more'])
  assert not target.exists()


def test_damaged_npz_and_wrong_checksum_are_refused(weights, folder):
  path = folder / 'weights.npz'
  path.write_bytes(weights[1].read_bytes()[:-1000])
  refused(inception.load, path, names=['weights.npz', 'convert_inception'])
  arrays = dict(np.load(weights[1]))
  name = 'params/fc/kernel'
  for changed in ({name: arrays[name] + 1}, {name: arrays[name][1:]}, {'sha256': np.array('0')}):
    np.savez(path, **arrays | changed)
    refused(inception.load, path, names=['weights.npz', 'convert_inception'])
  del arrays[name]
  np.savez(path, **arrays)
  refused(inception.load, path, names=[name])


# Distances over features.


def test_metrics_equal_torch_fidelity(torch, reference):
  """The two sets of features have a distribution like features of Inception."""
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(12, 64))
  real, generated = (
    np.maximum(0.1 * (scale * rng.normal(size=(count, 12)) + shift) @ mix + 0.3, 0).astype('f4')
    for count, shift, scale in ((1300, 0, 1), (1100, 0.3, 0.9))
  )
  # torch-fidelity computes in the dtype of the features. In float32, the rounding of its distances
  # moves one image out of or into a ball, which changes precision and recall.
  tensors = [torch.from_numpy(features).double() for features in (real, generated)]
  metric = reference.metric_fid
  moments = [metric.fid_features_to_statistics(features) for features in tensors]
  expected = metric.fid_statistics_to_metric(*moments, verbose=False)[metric.KEY_METRIC_FID]
  assert expected > 0.1
  distance = sample_quality.frechet_distance(*map(sample_quality.Moments.of, (real, generated)))
  np.testing.assert_allclose(distance, expected, rtol=1e-3)
  expected = reference.metric_kid.kid_features_to_metric(*tensors, kid_subsets=20, verbose=False)
  distance = sample_quality.kernel_distance(real, generated, subsets=20)
  np.testing.assert_allclose(distance, list(expected.values()), rtol=1e-9)
  for shuffled, seed in ((False, None), (True, 2020)):
    expected = reference.metric_isc.isc_features_to_metric(tensors[0].float(), 7, shuffled)
    score = sample_quality.inception_score(real, 7, seed)
    np.testing.assert_allclose(score, list(expected.values()), rtol=1e-9)
  expected = reference.metric_prc.prc_features_to_metric(*tensors[::-1], verbose=False)
  result = sample_quality.precision_recall(real, generated, chunk_size=500)
  assert 0.1 < min(result) < max(result) < 0.99
  np.testing.assert_allclose(result, list(expected.values())[:2], rtol=1e-6)
