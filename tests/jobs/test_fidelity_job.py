"""The fidelity job on a trained run, with features of the classifier."""

import dataclasses
import functools
import json
import shutil
import signal

import numpy as np
import pytest
from etils import epath
from PIL import Image

from farmer_jax import errors
from farmer_jax.data import sources
from farmer_jax.evaluation import classifier, feature_networks, image_sets
from farmer_jax.jobs import fidelity
from farmer_jax.ops import sample_quality
from tests.support import models, processes, runs

DATA = runs.CONFIG.data
NAMES = ('frechet_distance', 'score', 'kid', 'precision', 'recall', 'accuracy')
SAMPLES = '3-inverse=sequential'


@pytest.fixture(scope='module', autouse=True)
def network(trained, optimized):
  """The classifier of the run, trained for few steps and stored in the workdir."""
  with optimized(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(classifier, '_BATCH_SIZE', 64)
    patch.setattr(classifier, '_STEPS', 200)
    return feature_networks.load_classifier(DATA, epath.Path(trained) / 'fidelity', 50)


@pytest.fixture(scope='module')
def real():
  return sources.load(DATA, 'train')


def with_fidelity(**changes):
  settings = dict(count=50, name='results', batch_size=32, pairwise_images=300) | changes
  return models.replace(runs.with_sampling(batch_size=20), fidelity=settings)


def evaluate(run, samples=None, reference=None, **changes):
  """Runs the job and returns its report. Files are in the folder of the run."""
  files = {'samples': samples, 'reference': reference}
  files = {key: str(run / file) for key, file in files.items() if file}
  fidelity.run(with_fidelity(**files, **changes), run)
  return json.loads((run / 'fidelity' / 'results.json').read_text())


@pytest.mark.parametrize('labels', [np.zeros(3, int), np.full(5, -1), np.zeros(5)])
def test_labels_of_samples_are_checked(run, real, labels):
  np.savez(run / 'samples.npz', arr_0=real.images[:5], arr_1=labels)
  with pytest.raises(errors.DataError, match='arr_1 of .*samples.npz'):
    evaluate(run, samples='samples.npz')


def test_classifier_is_trained_once_and_recognizes_held_out_digits(network, run, real, monkeypatch):
  assert network.accuracy > 0.7  # chance: 0.1
  folder, trainings = epath.Path(run) / 'fidelity', []
  monkeypatch.setattr(classifier, '_train', lambda *args: trainings.append(args) or {})
  again = feature_networks.load_classifier(DATA, folder, 50)
  assert (again.identity, again.accuracy) == (network.identity, network.accuracy)
  (file,) = folder.iterdir()
  file.write_bytes(file.read_bytes()[:-2000])
  assert not trainings
  classifier.load_or_train(DATA, real, folder)  # A damaged file is replaced.
  assert len(trainings) == 1
  other = dataclasses.replace(real, images=255 - real.images)
  classifier.load_or_train(DATA, other, folder)
  assert len(trainings) == 2 and len(list(folder.iterdir())) == 2


def test_report_of_drawn_samples_names_the_network(run, capsys):
  fidelity.run(with_fidelity(name=None), run)
  report = json.loads((run / 'fidelity' / f'{SAMPLES}-50-pairwise_images=300.json').read_text())
  assert report['network'] == 'classifier' and report['reference'] == 'digits (train)'
  assert report['count'] == 50 and report['checkpoint_step'] == 3
  assert report['nonfinite_samples'] == 0
  assert all(np.isfinite(report[f'classifier_{name}']) for name in NAMES)
  assert not {'fid', 'inception_score', 'kid', 'precision', 'recall'} & set(report)
  assert report['classifier_accuracy_on_real_images'] > 0.7
  assert f'{report["classifier_frechet_distance"]:.4f}' in capsys.readouterr().out
  assert len(np.load(run / 'samples' / SAMPLES / '00000.npz')['arr_0']) == 50


def test_real_images_compared_with_themselves(run, real):
  np.savez(run / 'real.npz', arr_0=real.images, arr_1=real.labels)
  report = evaluate(run, samples='real.npz', count=5000)
  assert report['count'] == len(real)
  assert abs(report['classifier_frechet_distance']) < 1e-6
  assert report['classifier_precision'] == report['classifier_recall'] == 1
  assert report['classifier_accuracy'] > 0.7


def test_reference_statistics_without_images(run, network, real):
  """An npz file with mu and sigma, computed by NumPy."""
  statistics = network.statistics(image_sets.from_source(real, ''), 'images', len(real))
  features = statistics.features.astype(np.float64)
  np.savez(run / 'stats.npz', mu=features.mean(0), sigma=np.cov(features, rowvar=False))
  np.savez(run / 'samples.npz', arr_0=real.images[:50])
  report = evaluate(run, samples='samples.npz')
  from_statistics = evaluate(run, samples='samples.npz', reference='stats.npz')
  moments = sample_quality.Moments.of(features[:50]), sample_quality.Moments.of(features)
  for each in (report, from_statistics):
    distance = each['classifier_frechet_distance']
    np.testing.assert_allclose(distance, sample_quality.frechet_distance(*moments), rtol=1e-4)
  assert not {'classifier_precision', 'classifier_kid'} & set(from_statistics)


def test_metrics_do_not_depend_on_files_or_batch_size(run, real):
  for name in ('parts', 'pngs'):
    (run / name).mkdir()
  for number, part in enumerate(np.split(real.images[:90], (20, 21, 75))):
    np.savez(run / 'parts' / f'{number}.npz', arr_0=part)
  for number, image in enumerate(real.images[:90]):
    Image.fromarray(image[..., 0]).save(run / 'pngs' / f'{number:03d}.png')
  np.savez(run / 'all.npz', arr_0=real.images[:90])
  a = evaluate(run, samples='parts', batch_size=32)
  b = evaluate(run, samples='all.npz', batch_size=7)
  for name in NAMES[:-1]:
    values = a[f'classifier_{name}'], b[f'classifier_{name}']
    np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)
  report = evaluate(run, samples='pngs', reference='all.npz', count=90)
  assert abs(report['classifier_frechet_distance']) < 1e-6
  assert 'classifier_accuracy' not in report


@pytest.mark.faults
def test_report_after_sigkill_is_bit_exact(run, tmp_path):
  """The first process is killed after it has drawn the samples."""
  uninterrupted = shutil.copytree(run, tmp_path / 'uninterrupted')
  settings = ['fidelity.count=50', 'fidelity.name=results', 'fidelity.batch_size=32']
  settings += ['fidelity.pairwise_images=300', 'sampling.count=25', 'sampling.batch_size=20']
  settings.append('sampling.inverse=sequential')
  start = functools.partial(processes.start_job, 'fidelity', devices=1)
  killed = start(run, *settings, fault=('kill_before_features',))
  assert killed.codes() == [-signal.SIGKILL], killed.log()
  assert not (run / 'fidelity' / 'results.json').exists()
  for workdir in (run, uninterrupted):
    start(workdir, *settings).finish()
  reports = [(w / 'fidelity' / 'results.json').read_bytes() for w in (run, uninterrupted)]
  assert reports[0] == reports[1]


def test_different_samples_have_different_reports(run, real):
  """Names of sample folders contain dots, and different paths end in the same name."""
  paths = [run / name for name in ('a/3-scale=1.25', 'a/3-scale=1.5', 'b/3-scale=1.5')]
  for path in paths:
    path.mkdir(parents=True)
    np.savez(path / '00000.npz', arr_0=real.images[:20])
    fidelity.run(with_fidelity(name=None, samples=str(path)), run)
  assert len(list((run / 'fidelity').glob('*.json'))) == len(paths)


@pytest.mark.parametrize(
  'key, arrays, name',
  [
    ('network', None, 'config.fidelity.weights'),
    ('samples', None, '/file.npz'),
    ('samples', dict(arr_0=np.zeros((20, 8, 8, 1), np.float32)), 'float32'),
    ('samples', dict(arr_0=np.zeros((20, 8, 8), np.uint8)), r'\[20, 8, 8\]'),
    ('samples', dict(arr_0=np.zeros((20, 16, 16, 1), np.uint8)), '16 × 16'),
    ('reference', None, '/file.npz'),
    ('reference', dict(mu=np.zeros(2048), sigma=np.eye(2048)), '2048 features'),
    ('reference', dict(something=np.zeros(3)), 'file.npz'),
    ('reference', dict(mu=np.full(128, np.nan), sigma=np.eye(128)), 'not finite'),
    ('samples', dict(arr_0=np.zeros((3, 8, 8, 1), np.uint8)), '3 images'),
    ('reference', dict(mu=np.zeros(3)), 'file.npz'),
  ],
)
def test_missing_and_unsuitable_files_are_refused(run, key, arrays, name):
  if arrays:
    np.savez(run / 'file.npz', **arrays)
  error = errors.ConfigError if key == 'network' else errors.DataError
  with pytest.raises(error, match=name) as caught:
    evaluate(run, **{key: 'inception' if key == 'network' else 'file.npz'})
  assert '\n' not in str(caught.value)
