"""The held-out figure does not depend on how the images are batched."""

import jax
import numpy as np
import pytest

from farmer_jax import config
from farmer_jax.data import pipeline, sources
from farmer_jax.evaluation import likelihood
from farmer_jax.nn import farmer

SMALL = config.Model(
  patch_size=4,
  flow=config.Flow(blocks=1, layers=1, width=8, head_dim=8),
  prior=config.Prior(layers=1, width=8, head_dim=8, condition_copies=1, components=2),
)


@pytest.fixture(name='setup', scope='module')
def _setup():
  built = config.Config(noise=config.Noise(kind='gaussian', std_end=0.0), model=SMALL)
  model = farmer.build(built)
  params = farmer.init_params(jax.random.key(0), model=model)
  return built, model, params, sources.load(built.data, 'valid')


def test_batches_and_padding_do_not_change_the_mean(setup):
  """Without noise the value of an image is fixed, so any batching must give one mean."""
  built, model, params, source = setup
  evaluate = likelihood.LikelihoodEvaluator(model, built)
  means = [
    evaluate(params, pipeline.valid_batches(source, size)) for size in (1, 7, 64, len(source), 250)
  ]
  for other in means[1:]:
    for name, value in means[0].items():
      np.testing.assert_allclose(other[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_non_finite_image_counts_and_a_non_finite_padding_does_not(setup):
  built, model, params, source = setup
  evaluate = likelihood.LikelihoodEvaluator(model, built)
  batch = next(iter(pipeline.valid_batches(source, 4)))
  real = {**batch, 'image': batch['image'].astype(np.float32)}
  real['image'][3] = np.nan
  assert np.isnan(evaluate(params, [real])['loss'])
  real['mask'] = np.array([1, 1, 1, 0], bool)
  assert np.isfinite(evaluate(params, [real])['loss'])


def test_gaussian_noise_never_claims_bits(setup):
  built, model, params, source = setup
  values = likelihood.LikelihoodEvaluator(model, built)(params, pipeline.valid_batches(source, 64))
  assert 'bits_per_dim' not in values
  assert values['noise_std'] == 0.0


def test_uniform_noise_is_the_same_at_every_evaluation(setup):
  _, model, params, source = setup
  uniform = config.Config(model=SMALL)
  evaluate = likelihood.LikelihoodEvaluator(model, uniform)
  first, second = (evaluate(params, pipeline.valid_batches(source, 64)) for _ in range(2))
  assert first == second
  np.testing.assert_allclose(first['bits_per_dim'], first['loss'] / np.log(2) + 7)
