"""Scores of images: exact where the density is known, and independent of how images are batched."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from farmer_jax import config
from farmer_jax.data import pipeline, sources
from farmer_jax.evaluation import likelihood
from farmer_jax.nn import farmer

CLASSES = 10


def settings(flow_changes=None, **prior_changes):
  prior = dict(layers=1, width=8, head_dim=8, condition_copies=1, components=2) | prior_changes
  return config.Model(
    patch_size=4,
    flow=config.Flow(**(dict(blocks=2, layers=1, width=8, head_dim=8) | (flow_changes or {}))),
    prior=config.Prior(**prior),
  )


GAUSSIAN = config.Config(noise=config.Noise(kind='gaussian', std_end=0.0), model=settings())
UNIFORM = config.Config(model=settings())


def build(built):
  """A model and parameters that are all random, so that class, flow and redundant part matter."""
  model = farmer.build(built)
  params = farmer.init_params(jax.random.key(0), model=model)
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  return model, jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), params)


@pytest.fixture(scope='module')
def source():
  return sources.load(UNIFORM.data, 'valid')


def score(built, params, source, count=24, **changes):
  """Scores of the first images, as NumPy arrays in float64."""
  scorer = jax.jit(likelihood.Scorer(farmer.build(built), built, **changes))
  batch = next(iter(pipeline.valid_batches(source, count)))
  found = scorer(params, batch['image'], batch['label'], batch['index'])
  return {name: np.asarray(array, np.float64) for name, array in found.items()}, batch


def test_a_known_density_is_scored_exactly(source):
  """No flow, one Gaussian a token, whose mean and scale the head's bias alone decides."""
  built = dataclasses.replace(GAUSSIAN, model=settings(dict(blocks=0), components=1))
  model, params = build(built)
  mean, log_scale = np.linspace(-0.5, 0.5, 16), np.linspace(-1, 0.3, 16)
  head = params['prior']['informative_head']['out']
  head['kernel'] = jnp.zeros_like(head['kernel'])
  head['bias'] = jnp.asarray(np.concatenate([[0.7], mean, log_scale]), jnp.float32)
  found, batch = score(built, params, source)
  pixels = batch['image'][..., 0] / 127.5 - 1
  tokens = pixels.reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 16)
  scale = np.exp(log_scale) + 1e-3  # above the floor
  expected = -stats.norm.logpdf(tokens, mean, scale)
  np.testing.assert_allclose(found['loss'], expected.sum((1, 2)) / 64, rtol=1e-6)
  np.testing.assert_allclose(found['tokens'], expected.sum(2), rtol=1e-5)
  assert 'loss_importance' not in found


@pytest.mark.parametrize('conditional_flow', [False, True])
def test_an_unknown_class_is_averaged_over(source, conditional_flow):
  """Against the densities given each class, one by one; and the terms add up."""
  flow = dict(class_conditional=conditional_flow)
  built = dataclasses.replace(UNIFORM, model=settings(flow, informative_channels=5))
  _, params = build(built)
  found, batch = score(built, params, source, condition='marginal')
  given = []
  for label in range(CLASSES):
    scorer = jax.jit(likelihood.Scorer(farmer.build(built), built))
    labels = np.full_like(batch['label'], label)
    given.append(scorer(params, batch['image'], labels, batch['index'])['loss'])
  log_classes = -64 * np.asarray(given, np.float64)  # [C, B]
  assert log_classes.std(0).min() > 0.5
  expected = special.logsumexp(log_classes, axis=0) - math.log(CLASSES)
  np.testing.assert_allclose(-64 * found['loss'], expected, rtol=1e-5)
  np.testing.assert_array_equal(found['predicted'], log_classes.argmax(0))
  posterior = special.softmax(log_classes, axis=0)
  entropy = special.entr(posterior).sum(0)
  np.testing.assert_allclose(64 * found['nll_class'], math.log(CLASSES) - entropy, atol=1e-3)
  terms = ('nll_informative', 'nll_redundant', 'log_det', 'nll_class')
  np.testing.assert_allclose(sum(found[name] for name in terms), found['loss'], atol=1e-5)
  np.testing.assert_allclose(found['log_dets'].sum(1), found['log_det'], atol=1e-5)
  np.testing.assert_allclose(found['tokens'].sum(1) / 64, found['nll_informative'], atol=1e-5)


def test_without_a_class(source):
  _, params = build(UNIFORM)
  found, batch = score(UNIFORM, params, source, condition='none')
  scorer = jax.jit(likelihood.Scorer(farmer.build(UNIFORM), UNIFORM))
  none = np.full_like(batch['label'], CLASSES)
  np.testing.assert_allclose(
    found['loss'], scorer(params, batch['image'], none, batch['index'])['loss'], rtol=1e-6
  )
  labelled, _ = score(UNIFORM, params, source)
  assert abs(found['loss'] - labelled['loss']).min() > 1e-4


def test_importance_weighting_tightens_the_bound_of_every_image(source):
  """Several draws: the first is that of one draw, bounds are means and log-means of densities."""
  _, params = build(UNIFORM)
  one, _ = score(UNIFORM, params, source, draws=1)
  assert 'loss_importance' not in one
  few, many = (score(UNIFORM, params, source, draws=k)[0] for k in (2, 32))
  for found in (few, many):
    assert (found['loss_importance'] <= found['loss'] + 1e-5).all()
    assert (found['loss_importance'] < found['loss'] - 1e-5).mean() > 0.5
  assert many['loss_importance'].mean() < few['loss_importance'].mean()
  second = 2 * few['loss'] - one['loss']
  expected = -special.logsumexp([-64 * one['loss'], -64 * second], axis=0) + math.log(2)
  np.testing.assert_allclose(few['loss_importance'], expected / 64, rtol=1e-5)
  other, _ = score(UNIFORM, params, source, seed=1)
  assert abs(other['loss'] - one['loss']).min() > 0


def test_batches_and_padding_do_not_change_the_mean(source):
  """The noise of an image is its own, so any batching must give one mean."""
  model, params = build(UNIFORM)
  evaluate = likelihood.LikelihoodEvaluator(model, UNIFORM)
  means = [
    evaluate(params, pipeline.valid_batches(source, size)) for size in (1, 7, 64, len(source), 250)
  ]
  for other in means[1:]:
    for name, value in means[0].items():
      np.testing.assert_allclose(other[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
  np.testing.assert_allclose(means[0]['bits_per_dim'], means[0]['loss'] / np.log(2) + 7)


def test_a_non_finite_image_counts_and_a_non_finite_padding_does_not(source):
  model, params = build(GAUSSIAN)
  evaluate = likelihood.LikelihoodEvaluator(model, GAUSSIAN)
  batch = next(iter(pipeline.valid_batches(source, 4)))
  real = {**batch, 'image': batch['image'].astype(np.float32)}
  real['image'][3] = np.nan
  assert np.isnan(evaluate(params, [real])['loss'])
  real['mask'] = np.array([1, 1, 1, 0], bool)
  assert np.isfinite(evaluate(params, [real])['loss'])


def test_gaussian_noise_never_claims_bits(source):
  model, params = build(GAUSSIAN)
  values = likelihood.LikelihoodEvaluator(model, GAUSSIAN)(
    params, pipeline.valid_batches(source, 64)
  )
  assert 'bits_per_dim' not in values
  assert values['noise_std'] == 0.0
