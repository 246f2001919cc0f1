"""The fidelity job on a real run, judged by a classifier, and on images from elsewhere."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from farmer_jax import config, errors
from farmer_jax.data import base, sources
from farmer_jax.evaluation import classifier, inception
from farmer_jax.jobs import fidelity
from farmer_jax.ops import frechet
from tests.support import runs as tiny_run

CONFIG = dataclasses.replace(
  tiny_run.CONFIG, sampling=config.Sampling(inverse='sequential', batch_size=20)
)
NAMES = ('frechet_distance', 'score', 'kid', 'precision', 'recall', 'accuracy')


@pytest.fixture(scope='module', autouse=True)
def judge(trained, optimized):
  """The classifier that judges the run: trained for a shorter time, and kept with it."""
  with optimized(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(classifier, '_BATCH', 64)
    patch.setattr(classifier, '_STEPS', 400)
    real = sources.load(CONFIG.data, 'train')
    folder = epath.Path(trained) / 'fidelity'
    return classifier.load_or_train(CONFIG.data, real, folder, base.contents(real))


def with_settings(**changes):
  return dataclasses.replace(
    CONFIG, fidelity=config.Fidelity(**(dict(count=50, name='found', batch_size=32) | changes))
  )


def report(run, name='found'):
  return json.loads((run / 'fidelity' / f'{name}.json').read_text())


def test_draws_what_is_missing_and_names_the_network(run, capsys):
  fidelity.run(with_settings(name=None), run)
  found = report(run, '3-inverse=sequential-50')
  assert found['network'] == 'classifier' and found['reference'] == 'digits (train)'
  assert found['count'] == 50 and found['checkpoint_step'] == 3
  assert found['nonfinite_samples'] == 0
  for name in NAMES:
    assert np.isfinite(found[f'classifier_{name}'])
  assert not {'fid', 'inception_score', 'kid', 'precision', 'recall'} & set(found)
  assert found['classifier_accuracy_on_real_images'] > 0.7
  out = capsys.readouterr().out
  assert f'{found["classifier_frechet_distance"]:.4f}' in out
  assert len(np.load(run / 'samples' / '3-inverse=sequential' / '00000.npz')['arr_0']) == 50


def test_a_set_compared_with_itself(run):
  """Real images against themselves, from an npz and from a folder of PNGs."""
  real = sources.load(CONFIG.data, 'train')
  np.savez(run / 'real.npz', arr_0=real.images, arr_1=real.labels)
  fidelity.run(with_settings(samples=str(run / 'real.npz'), count=5000), run)
  found = report(run)
  assert found['count'] == len(real)
  assert abs(found['classifier_frechet_distance']) < 1e-6
  assert found['classifier_precision'] == found['classifier_recall'] == 1
  assert found['classifier_accuracy'] > 0.7
  (run / 'pngs').mkdir()
  for number, image in enumerate(real.images[:60]):
    Image.fromarray(image[..., 0]).save(run / 'pngs' / f'{number:03d}.png')
  np.savez(run / 'sixty.npz', arr_0=real.images[:60])
  built = with_settings(samples=str(run / 'pngs'), reference=str(run / 'sixty.npz'))
  fidelity.run(
    dataclasses.replace(built, fidelity=dataclasses.replace(built.fidelity, count=60)), run
  )
  assert abs(report(run)['classifier_frechet_distance']) < 1e-6
  assert 'classifier_accuracy' not in report(run)


def test_statistics_of_others_need_no_images(run, judge):
  """Moments computed by hand, as an npz with mu and sigma."""
  real = sources.load(CONFIG.data, 'train')
  fidelity.run(with_settings(), run)
  network, params, _ = judge
  features = np.asarray(network(params, real.images).pool, np.float64)
  np.savez(run / 'stats.npz', mu=features.mean(0), sigma=np.cov(features, rowvar=False))
  fidelity.run(with_settings(name='stats', reference=str(run / 'stats.npz')), run)
  found, expected = report(run, 'stats'), report(run)
  np.testing.assert_allclose(
    found['classifier_frechet_distance'], expected['classifier_frechet_distance'], rtol=1e-4
  )
  assert 'classifier_precision' not in found and 'classifier_kid' not in found
  drawn = np.load(run / 'samples' / '3-inverse=sequential' / '00000.npz')['arr_0']
  own = np.asarray(network(params, drawn).pool, np.float64)
  direct = frechet.frechet_distance(
    own.mean(0), np.cov(own, rowvar=False), features.mean(0), np.cov(features, rowvar=False)
  )
  np.testing.assert_allclose(found['classifier_frechet_distance'], direct, rtol=1e-4)


def test_images_of_a_reference_do_not_depend_on_shards_or_batches(run, tmp_path):
  real = sources.load(CONFIG.data, 'train').images
  (tmp_path / 'parts').mkdir()
  for number, part in enumerate(np.split(real[:90], (20, 21, 75))):
    np.savez(tmp_path / 'parts' / f'{number}.npz', arr_0=part)
  np.savez(tmp_path / 'whole.npz', arr_0=real[:90])
  for name, path, size in (('a', 'parts', 32), ('b', 'whole.npz', 7)):
    built = with_settings(name=name, samples=str(tmp_path / path), batch_size=size)
    fidelity.run(built, run)
  for name in NAMES[:-1]:
    a, b = (report(run, each)[f'classifier_{name}'] for each in 'ab')
    np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)


def test_a_killed_job_ends_in_the_same_report(run, tmp_path):
  """A real process, killed while it looks at the samples that it has drawn; the same bytes."""
  whole = tmp_path / 'whole'
  shutil.copytree(run, whole)
  program = """
import os, signal
from farmer_jax.evaluation import feature_statistics as looking
call, calls = looking.Extractor.__call__, []
def killing(self, gather, count, kept, what, *more):
  if what == 'samples' and KILL:
    os.kill(os.getpid(), signal.SIGKILL)
  return call(self, gather, count, kept, what, *more)
looking.Extractor.__call__ = killing
from farmer_jax import config
from farmer_jax.jobs import fidelity
"""

  def do(workdir, kill):
    built = config.to_dict(with_settings())
    call = f'fidelity.run(config.from_config_dict({built!r}), {str(workdir)!r})'
    command = [sys.executable, '-c', f'KILL = {kill}\n{program}\n{call}']
    return subprocess.run(command, capture_output=True, env=os.environ)

  killed = do(run, True)
  assert killed.returncode == -9, killed.stderr.decode()
  assert not (run / 'fidelity' / 'found.json').exists()
  for workdir in (run, whole):
    done = do(workdir, False)
    assert done.returncode == 0, done.stderr.decode()
  found = [(w / 'fidelity' / 'found.json').read_bytes() for w in (run, whole)]
  assert found[0] == found[1]


def test_images_of_other_kinds_are_refused(run):
  for array, message in (
    (np.zeros((20, 8, 8, 1), np.float32), 'float32'),
    (np.zeros((20, 8, 8), np.uint8), r'images are uint8 \[n, H, W'),
    (np.zeros((20, 16, 16, 1), np.uint8), '16 × 16 pixels'),
  ):
    np.savez(run / 'other.npz', arr_0=array)
    with pytest.raises(errors.ConfigError, match=message):
      fidelity.run(with_settings(samples=str(run / 'other.npz')), run)


def test_settings_have_files_of_their_own(run, tmp_path):
  """Scales in folder names have dots; files elsewhere may have the same name."""
  real = sources.load(CONFIG.data, 'train').images
  for scale in (1.25, 1.5):
    built = with_settings(name=None, count=20)
    guidance = config.Guidance(scale=scale)
    sampling = dataclasses.replace(built.sampling, guidance=guidance)
    fidelity.run(dataclasses.replace(built, sampling=sampling), run)
  for folder in 'ab':
    (tmp_path / folder).mkdir()
    np.savez(tmp_path / folder / 'x.npz', arr_0=real[:20])
    fidelity.run(with_settings(name=None, samples=str(tmp_path / folder / 'x.npz')), run)
  assert len(list((run / 'fidelity').glob('*.json'))) == 4


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(network='inception'), 'pt_inception-2015-12-05-6726825d.pth'),
    (dict(samples='/nowhere'), '/nowhere does not exist'),
    (dict(reference='/nowhere.npz'), 'cannot read /nowhere.npz'),
  ],
)
def test_mistakes(trained, changes, message):
  with pytest.raises(errors.ConfigError, match=message) as caught:
    fidelity.run(with_settings(**changes), trained)
  assert '\n' not in str(caught.value)


def test_statistics_of_another_network_are_refused(run):
  np.savez(run / 'stats.npz', mu=np.zeros(2048), sigma=np.eye(2048))
  with pytest.raises(errors.ConfigError, match='2048 features, and the classifier has 128'):
    fidelity.run(with_settings(reference=str(run / 'stats.npz')), run)
  np.savez(run / 'stats.npz', something=np.zeros(3))
  with pytest.raises(errors.ConfigError, match='nor statistics'):
    fidelity.run(with_settings(reference=str(run / 'stats.npz')), run)
  assert inception.CHANNELS == 2048
