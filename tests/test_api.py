"""The Python API on a tiny run. tests/jobs/test_sample.py compares `Run.sample` with the job."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import farmer_jax
from farmer_jax import config, errors, noise
from farmer_jax.configs import from_run
from farmer_jax.data import pipeline, sources
from farmer_jax.evaluation import scoring, validation
from farmer_jax.ops import units
from farmer_jax.workdir import layout
from tests.support.runs import CONFIG, save_run

SETTINGS = {'sampling.batch_size': 8, 'likelihood.batch_size': 20}


@pytest.fixture(scope='module')
def loaded(trained):
  return farmer_jax.load(trained, overrides=SETTINGS)


@pytest.fixture(scope='module')
def source():
  return sources.load(CONFIG.data, 'valid')


@pytest.fixture(scope='module')
def examples(source):
  return source.gather(np.arange(20))


def test_attributes_of_a_run(loaded, trained):
  assert isinstance(loaded, farmer_jax.Run) and loaded.step == 3
  assert str(loaded.workdir) == str(trained) and loaded.class_names == tuple('0123456789')
  assert loaded.config.model == CONFIG.model and loaded.config.sampling.batch_size == 8
  assert set(loaded.params) == {'flow', 'prior'} and loaded.model.num_tokens == 16
  assert all(leaf.any() for leaf in jax.tree.leaves(loaded.params))  # the EMA, see `runs`


def test_log_prob_equals_the_scores_of_the_likelihood_job(loaded, run, source, examples):
  settings = config.Likelihood(examples=20, batch_size=20)
  built = dataclasses.replace(CONFIG, likelihood=settings)
  scorer = scoring.Scoring(built, epath.Path(run), loaded.params, 3, loaded.mesh)
  rows = scorer.score(source, 'images')
  found = loaded.log_prob(examples['image'], examples['label'])
  np.testing.assert_allclose(found.bits_per_dim, rows['bits_per_dim'], rtol=1e-6)
  np.testing.assert_allclose(found.bits_per_dim, units.bits_per_dim(-found.nats / 64), rtol=1e-6)


def test_log_prob_equals_validation(loaded, source):
  """The mean over the validation images is the figure that training reports."""
  evaluate = validation.LikelihoodEvaluator(loaded.model, CONFIG)
  expected = evaluate(loaded.params, pipeline.evaluation_batches(source, 60))
  batch = source.gather(np.arange(len(source)))
  found = loaded.log_prob(batch['image'], batch['label'], seed=CONFIG.seed)
  assert found.bits_per_dim.mean() == pytest.approx(expected['bits_per_dim'], abs=1e-5)
  assert -found.nats.mean() / 64 == pytest.approx(expected['loss'], abs=1e-5)


def test_log_prob_of_one_image(loaded, examples):
  """It does not depend on the other images of the batch, but on the label and on the draws."""
  images, labels = examples['image'], examples['label']
  found = loaded.log_prob(images, labels, num_draws=2).nats
  others = loaded.log_prob(images[[0, *range(19, 0, -1)]], labels, num_draws=2).nats
  assert found[0] == pytest.approx(others[0], rel=1e-5) and found[1] != others[1]
  assert found[0] != loaded.log_prob(images, labels).nats[0]
  no_class = loaded.log_prob(images).nats
  np.testing.assert_array_equal(no_class, loaded.log_prob(images, [None] * 20).nats)
  assert (no_class != loaded.log_prob(images, labels).nats).all()


def test_decode_inverts_encode(loaded, examples):
  latents = loaded.encode(examples['image'], examples['label'])
  assert latents.shape == (20, 16, 4) and latents.dtype == np.float32
  images = loaded.decode(latents, examples['label'])
  # Rounding can move a value across an edge between gray levels only if the noise put it there.
  batch = jnp.asarray(examples['image']), jnp.arange(20)
  values = noise.evaluation_images(noise.build(CONFIG.noise), *batch, seed=0)
  distance = np.abs((np.asarray(values) + 1) * 128 % 1 - 0.5)
  inside = distance < 0.4999
  assert inside.mean() > 0.99
  np.testing.assert_array_equal(images[inside], examples['image'][inside])
  np.testing.assert_allclose(images.astype(int), examples['image'], atol=1)


WRONG_IMAGES = [((2, 8, 8, 3), 'uint8'), ((2, 8, 8, 1), 'float32'), ((8, 8, 1), 'uint8')]
WRONG_IMAGES += [((0, 8, 8, 1), 'uint8')]


@pytest.mark.parametrize(
  ('method', 'array', 'labels', 'named'),
  [
    *(
      (name, wrong, [0, 1], r'uint8 \[B, 8, 8, 1\]')
      for name in ('log_prob', 'encode')
      for wrong in WRONG_IMAGES
    ),
    ('decode', ((2, 16, 3), 'float32'), [0, 1], r'\[B, 16, 4\]'),
    ('decode', ((2, 16, 4), 'int32'), [0, 1], r'\[B, 16, 4\]'),
    ('log_prob', ((20, 8, 8, 1), 'uint8'), range(19), '19 labels for 20 images'),
    *(('sample', None, [0, label], str(label)) for label in (10, -1, 'dragon')),
  ],
)
def test_wrong_arrays_and_labels(loaded, method, array, labels, named):
  arrays = [np.zeros(*array)] if array else []
  with pytest.raises(errors.DataError, match=named) as caught:
    getattr(loaded, method)(*arrays, labels)
  assert '\n' not in str(caught.value)


def test_wrong_overrides_runs_and_checkpoints(trained, tmp_path):
  for overrides, error, named in (
    ({'sampling.seeed': 1}, errors.ConfigError, 'sampling.seeed.*sampling.seed'),
    ({'sampling.batch_size': 0}, errors.ConfigError, 'sampling.batch_size'),
    ({'model.patch_size': 4}, errors.WorkdirError, 'model.patch_size'),
  ):
    with pytest.raises(error, match=named):
      farmer_jax.load(trained, overrides=overrides)
  with pytest.raises(errors.WorkdirError, match=str(tmp_path)):
    farmer_jax.load(tmp_path)


def test_missing_checkpoint_is_reported_when_the_run_is_loaded(trained):
  with pytest.raises(errors.CheckpointError, match=r'step 7 \(it has 3\)') as caught:
    farmer_jax.load(trained, step=7)
  assert '\n' not in str(caught.value)
  assert farmer_jax.load(trained, step=3).step == 3


@pytest.mark.parametrize('job', ['sample', 'likelihood', 'fidelity', 'export'])
def test_jobs_on_a_tuned_run_do_not_need_its_source(run, job):
  """`init_from` and `init_parts` have no effect on jobs that do not train."""
  saved = layout.read_config(run) | {'init_from': '/missing/RUN', 'init_parts': 'flow'}
  layout.write_json(epath.Path(run) / 'config.json', saved)
  values = from_run.get_config(str(run))
  values.job = job
  found = config.from_config_dict(values)
  config.check(found)
  assert farmer_jax.Run(run, found).params['prior']


@pytest.mark.parametrize('method', ['sample', 'sample_with_log_prob'])
def test_samples_need_labels(loaded, method):
  with pytest.raises(errors.DataError, match=r'\[None\] \* num_images'):
    getattr(loaded, method)(None)


def test_samples_without_noise_have_no_density(trained):
  run = farmer_jax.load(trained)
  denoising = dataclasses.replace(run.config, distill=config.Distill(denoise=True))
  run.config = denoising.with_sampling(inverse='student')
  with pytest.raises(errors.ConfigError, match='inverse=auto'):
    run.sample_with_log_prob([0])


def test_float64_needs_x64(trained, loaded, examples):
  run = farmer_jax.load(trained, overrides=SETTINGS | {'likelihood.dtype': 'float64'})
  with pytest.raises(errors.ConfigError, match='config.likelihood.dtype.*jax_enable_x64'):
    run.log_prob(examples['image'])
  with jax.enable_x64(True):
    double = run.log_prob(examples['image'])
  assert double.nats.dtype == np.float64
  np.testing.assert_allclose(double.nats, loaded.log_prob(examples['image']).nats, rtol=1e-5)


@pytest.mark.slow
def test_float64_run_in_float32(tmp_path, examples):
  """A checkpoint is read in its own dtype. Its parameters are converted when they are used."""
  built = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype='float64'))
  images, labels = examples['image'][:8], examples['label'][:8]
  with jax.enable_x64(True):
    workdir = save_run(tmp_path / 'run', built)
    single, double = (
      farmer_jax.load(workdir, overrides=SETTINGS | {'likelihood.dtype': t, 'sampling.dtype': t})
      for t in ('float32', 'float64')
    )
    found, expected = (run.log_prob(images, labels).nats for run in (single, double))
    assert (found.dtype, expected.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    latents = single.encode(images, labels)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, double.encode(images, labels), rtol=1e-3, atol=1e-3)
    assert single.sample(labels).shape == images.shape
