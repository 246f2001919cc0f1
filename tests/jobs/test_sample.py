"""The sampling job on a tiny run: results, resumption, and error messages."""

import functools
import json
import shutil
import signal
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from farmer_jax import api, config, errors, sampling
from farmer_jax.evaluation import sampling_figures
from farmer_jax.jobs import sample
from farmer_jax.nn import farmer
from farmer_jax.sampling import inverse, to_disk
from farmer_jax.workdir import results
from tests.support import models, processes, runs
from tests.support.runs import CONFIG, read_samples, with_sampling

FOLDER = '3-seed=5-inverse=sequential'


@pytest.fixture(scope='module')
def drawn(trained, tmp_path_factory):
  """The tiny run with 25 samples and with figures, which tests must not change.

  The figures have 8 rows like a batch of samples, so that the programs are compiled once.
  """
  run = shutil.copytree(trained, tmp_path_factory.mktemp('drawn') / 'run')
  sample.run(with_sampling(seed=5, png=True, figures=True, grid_rows=8), run)
  return run


@pytest.fixture(scope='module')
def expected(drawn):
  return read_samples(drawn / 'samples' / FOLDER)


def test_writes_images_a_grid_and_a_report(drawn, expected, trained):
  folder = drawn / 'samples' / FOLDER
  assert expected['arr_0'].shape == (25, 8, 8, 1) and expected['arr_0'].dtype == np.uint8
  np.testing.assert_array_equal(expected['arr_1'], np.arange(25) % 10)
  assert len(np.unique(expected['arr_0'], axis=0)) == 25
  report = json.loads((folder / 'samples.json').read_text())
  assert report['count'] == 25 and report['checkpoint_step'] == 3
  assert report['nonfinite_samples'] == int((~expected['finite']).sum()) == 0
  assert report['seconds_per_image']['inverse'] > 0
  assert Image.open(folder / 'grid.png').size[0] > 2 * 56
  single = np.asarray(Image.open(folder / 'png' / '000007.png'))
  np.testing.assert_array_equal(single, expected['arr_0'][7].repeat(3, -1))
  assert (drawn / 'config.json').read_text() == (trained / 'config.json').read_text()
  for name, columns in (('guidance', 7), ('redundant', 9), ('denoising_path', 3)):
    picture = np.asarray(Image.open(drawn / 'figures' / f'{name}.png'))
    assert abs(picture.shape[1] - columns * 60) < 40 and picture.std() > 10
  assert Image.open(drawn / 'figures' / 'log_det.png').size[1] == 4 + 3 * 60  # 8 of 25 per row


def test_densities_of_samples(drawn, expected):
  """tests/sampling/test_sampler.py compares the densities of a batch with a reference."""
  report = json.loads((drawn / 'samples' / FOLDER / 'samples.json').read_text())['densities']
  assert report['count'] == 25 and report['unit'] == 'nats/dim'
  assert report['density_of'] == 'samples before quantization'
  for name in ('loss', 'log_det'):
    values = expected[name].astype(np.float64)
    assert expected[name].dtype == np.float32 and len(np.unique(values)) == 25
    found = report[name]['mean'], report[name]['std']
    np.testing.assert_allclose(found, (values.mean(), values.std()), rtol=1e-6)
  # The likelihood of the images that the samples are rounded to is similar.
  scores = api.load(drawn).log_prob(expected['arr_0'], expected['arr_1'])
  assert abs(-scores.nats / 64 - expected['loss']).max() < 0.5
  assert np.corrcoef(-scores.log_det, expected['log_det'])[0, 1] > 0.9


def test_densities_change_no_image_and_files_without_them_are_drawn_again(
  drawn, expected, run, monkeypatch, caplog
):
  """The first 10 of 12 images are in a full file. Earlier versions wrote the same files."""
  monkeypatch.setattr(results, 'ROWS_PER_FILE', 10)
  folder, densities = run / 'samples' / FOLDER, ('loss', 'log_det')
  sample.run(with_sampling(seed=5, count=12), run)
  assert sorted(read_samples(folder)) == ['arr_0', 'arr_1', 'finite', 'residual']
  report = json.loads((folder / 'samples.json').read_text())
  assert report['densities'] is None and 'densities' not in report['seconds_per_image']
  sample.run(with_sampling(seed=5, densities=True), run)
  assert 'lacks an array' in caplog.text
  samples = read_samples(folder)
  assert set(samples) == set(expected)
  for name, values in samples.items():
    np.testing.assert_array_equal(values, expected[name])
  # Without densities, complete files stay as they are.
  sample.run(with_sampling(seed=5, count=27), run)
  kept = [set(np.load(file)).issuperset(densities) for file in sorted(folder.glob('*.npz'))]
  assert kept == [True, True, False]


def test_collapsed_pools_of_guidance_are_reported(drawn, run, caplog):
  guidance = config.Guidance(scale=1.0, sharpening=1e3, redundant_candidates=16)
  folder = sample.run(with_sampling(count=8, guidance=guidance), run)
  report = json.loads((folder / 'samples.json').read_text())['guidance_pools']
  assert report['images'] == 8
  for name, candidates in (('informative', 10), ('redundant', 32)):
    pool = report[name]
    assert pool['candidates'] == candidates
    assert 1 / candidates <= pool['quantile_5'] <= pool['mean'] < 2 / candidates
  assert len(report['informative']['by_token']) == 16
  np.testing.assert_allclose(
    np.mean(report['informative']['by_token']), report['informative']['mean']
  )
  warnings = [r.message for r in caplog.records if r.levelname == 'WARNING']
  for key in ('conditional_candidates', 'redundant_candidates'):
    assert sum(f'config.sampling.guidance.{key}' in message for message in warnings) == 1
  plain = json.loads((drawn / 'samples' / FOLDER / 'samples.json').read_text())
  assert plain['guidance_pools'] is None


def test_rows_of_the_figure_by_log_det():
  log_dets = np.random.default_rng(0).permutation(np.arange(200.0))
  log_dets[log_dets == 0] = -np.inf
  log_dets[log_dets == 199] = np.nan
  names, rows = sampling_figures.by_log_det(log_dets)
  np.testing.assert_array_equal(log_dets[rows[:4]].ravel(), np.arange(1, 33))
  np.testing.assert_array_equal(log_dets[rows[4:8]].ravel(), np.arange(84, 116))
  np.testing.assert_array_equal(log_dets[rows[8:]].ravel(), np.arange(167, 199))
  assert len(names) == 12 and names[1].startswith('lowest') and '9.000 to 16.000' in names[1]
  for count, shape in ((0, (0, 1)), (1, (3, 1)), (2, (3, 1)), (25, (3, 8)), (60, (6, 8))):
    names, rows = sampling_figures.by_log_det(log_dets[np.isfinite(log_dets)][:count])
    assert rows.shape == shape and len(names) == shape[0]


def test_damaged_shard_is_drawn_again_with_other_counts_batches_and_shards(
  drawn, expected, tmp_path, monkeypatch
):
  folder = shutil.copytree(drawn, tmp_path / 'run') / 'samples' / FOLDER
  (file,) = folder.glob('*.npz')
  file.write_bytes(file.read_bytes()[:-100])
  monkeypatch.setattr(results, 'ROWS_PER_FILE', 10)
  # Batches of different sizes round differently.
  for count, batch_size, tolerance in ((5, 8, 0), (25, 7, 1)):
    built = with_sampling(count=count, batch_size=batch_size, seed=5)
    assert sample.run(built, tmp_path / 'run') == folder
    samples = read_samples(folder)
    assert len(samples['arr_0']) == count and len(list(folder.glob('*.npz'))) == -(-count // 10)
    difference = abs(samples['arr_0'].astype(int) - expected['arr_0'][:count])
    assert difference.max() <= tolerance and (difference > 0).mean() < 0.01
    np.testing.assert_array_equal(samples['arr_1'], expected['arr_1'][:count])


def test_python_api_draws_the_images_of_the_job(drawn, expected):
  settings = {'sampling.batch_size': 8, 'sampling.inverse': 'sequential'}
  run, labels = api.load(drawn, overrides=settings), expected['arr_1']
  images = run.sample(labels, seed=5)
  np.testing.assert_array_equal(images, expected['arr_0'])
  assert images.dtype == np.uint8 and (run.sample(labels) != images).any((1, 2, 3)).all()
  guided = run.sample(labels, seed=5, guidance=3.0)
  assert (guided != images).any()
  settings = config.Guidance(scale=3.0)
  np.testing.assert_array_equal(run.sample(labels, seed=5, guidance=settings), guided)
  named = run.sample([0, '1', 2, '3', *range(4, 9), None], seed=5)
  np.testing.assert_array_equal(named[:9], images[:9])
  assert (named[9] != images[9]).any()
  scored, log_prob = run.sample_with_log_prob(labels, seed=5)
  np.testing.assert_array_equal(scored, images)
  np.testing.assert_allclose(-log_prob.nats / 64, expected['loss'], rtol=1e-6)
  np.testing.assert_allclose(-log_prob.log_det / 64, expected['log_det'], rtol=1e-6)
  assert log_prob.bits_per_dim is None


@pytest.mark.faults
def test_resume_after_sigkill_is_bit_exact(run):
  settings = [f'sampling.{s}' for s in ('seed=5', 'count=25', 'batch_size=8', 'inverse=sequential')]
  start = functools.partial(processes.start_job, 'sample', run, *settings, devices=1)
  assert start(fault=('small_shards', 12, 0, 16)).codes() == [-signal.SIGKILL]
  folder = run / 'samples' / FOLDER
  partial = read_samples(folder)
  assert len(partial['arr_0']) == 16 and not (folder / 'samples.json').exists()
  start(fault=('small_shards', 12, 0)).finish()
  resumed = read_samples(folder)
  shutil.rmtree(folder)
  start(fault=('small_shards', 12, 0)).finish()
  for name, values in read_samples(folder).items():
    np.testing.assert_array_equal(resumed[name], values)
    np.testing.assert_array_equal(partial[name], values[:16])


def test_folder_name_lists_the_settings_of_the_images():
  assert to_disk.folder_name(config.Sampling(count=9, png=True, batch_size=2), 700) == '700'
  guidance = config.Guidance(scale=2.5)
  name = to_disk.folder_name(config.Sampling(guidance=guidance, labels='a/b, c', seed=1), 700)
  assert name == '700-labels=a_b,_c-seed=1-scale=2.5-b55bba15'
  assert ' ' not in name and '/' not in name
  names = {to_disk.folder_name(config.Sampling(labels='3,' * n), 1) for n in (200, 201)}
  assert len(names) == 2 and all(len(n) < 200 for n in names)


def test_parallel_inverse_draws_the_same_images_and_is_measured_once(run, expected, monkeypatch):
  sample.run(with_sampling(seed=5, inverse='parallel'), run)
  parallel = read_samples(run / 'samples' / '3-seed=5-inverse=parallel')['arr_0'].astype(int)
  assert abs(parallel - expected['arr_0']).max() <= 1
  ((key, plan),) = json.loads((run / 'inverse_plan.json').read_text()).items()
  assert 'parallel' in key and 'checkpoint 3' in key
  assert plan['chunk_sizes'] == [15, 15] and plan['difference'] < 1e-4
  measure = mock.Mock(return_value={'difference': 0.0, 'chunk_sizes': []})
  monkeypatch.setattr(inverse, 'plan_inverse', measure)
  trained_run = api.Run(run, CONFIG)
  for tolerance, count in ((1e-5, 0), (1e-3, 1), (1e-3, 1), (1e-5, 1)):
    built = with_sampling(seed=5, inverse='parallel', tolerance=tolerance)
    of_run = trained_run.model, trained_run.params, 3, [0], trained_run.mesh
    sampling.cached_measurement(built, run, *of_run)
    assert measure.call_count == count


def test_coupling_flow_has_one_inverse_which_is_not_measured(tmp_path):
  built = models.replace(CONFIG, model=dict(flow=dict(kind='coupling')))
  run, drawn = runs.save_run(tmp_path / 'run', built), []
  for inverse_kind in ('parallel', 'chunked'):
    settings = built.with_sampling(count=8, batch_size=8, inverse=inverse_kind)
    folder = sample.run(settings, run)
    drawn.append(read_samples(folder)['arr_0'])
    report = json.loads((folder / 'samples.json').read_text())
    assert report['largest_residual'] == report['nonfinite_samples'] == 0
  assert len(np.unique(drawn[0], axis=0)) == 8
  np.testing.assert_array_equal(*drawn)
  assert not (run / 'inverse_plan.json').exists()
  loaded, labels = api.load(run, overrides={'sampling.batch_size': 8}), np.arange(8)
  np.testing.assert_array_equal(loaded.sample(labels), drawn[0])
  assert (loaded.sample(labels, guidance=3.0) != drawn[0]).any()


def test_missing_checkpoint_and_missing_run(run, tmp_path):
  shutil.rmtree(run / 'checkpoints')
  with pytest.raises(errors.CheckpointError, match=str(run)):
    sample.run(with_sampling(), run)
  with pytest.raises(errors.WorkdirError, match='elsewhere'):
    sample.run(with_sampling(), tmp_path / 'elsewhere')
  assert not (tmp_path / 'elsewhere').exists()


@pytest.mark.parametrize('kind', ['autoregressive', 'coupling'])
def test_intermediate_tokens_of_a_new_flow_are_drawn_in_the_order_of_the_image(monkeypatch, kind):
  """A new flow only reorders, so that all columns of the path show the same tokens."""
  monkeypatch.setattr(sampling_figures.SamplingFigures, '_quantize', lambda self, x: np.asarray(x))
  monkeypatch.setattr(sampling_figures, '_rescale', np.asarray)
  sample_grid = mock.Mock()
  monkeypatch.setattr(sampling_figures.figures, 'sample_grid', sample_grid)
  built = models.replace(CONFIG, model=dict(flow=dict(kind=kind, blocks=3)))
  model = farmer.build(built)
  params = farmer.init_params(jax.random.key(0), model)
  sampling_figures.SamplingFigures(model, built, params, [0, 1], ['0', '1']).inversion_path()
  images = sample_grid.call_args.args[0]
  assert images.shape[1] == 4 and images.std() > 0.1
  np.testing.assert_allclose(images, images[:, -1:].repeat(4, 1), atol=1e-6)


def test_denoising_path_ends_in_the_sample(trained, expected, monkeypatch):
  sample_grid = mock.Mock()
  monkeypatch.setattr(sampling_figures.figures, 'sample_grid', sample_grid)
  run = api.Run(trained, CONFIG)
  names = [str(label) for label in range(8)]
  built = with_sampling(seed=5)
  labels = list(range(8))
  sampling_figures.SamplingFigures(run.model, built, run.params, labels, names).inversion_path()
  images, rows, titles = sample_grid.call_args.args
  assert titles == ['z^2', 'z^1', 'z^0'] and rows == names and images.shape[:2] == (8, 3)
  np.testing.assert_array_equal(images[:, -1], expected['arr_0'][:8])
