"""Likelihoods of images: exact for a known density, independent of batches, resumable."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from scipy import special, stats

from farmer_jax import config
from farmer_jax.data import pipeline, sources
from farmer_jax.distributed import mesh
from farmer_jax.evaluation import likelihood, likelihood_summary, scoring, validation
from farmer_jax.nn import farmer
from tests.support import models

NUM_CLASSES = 10
DIMS = 64  # of an image


STACK = dict(layers=1, width=8, head_dim=8)
MODEL = config.Model(
  patch_size=4,
  flow=config.Flow(blocks=2, **STACK),
  prior=config.Prior(condition_copies=1, components=2, **STACK),
)
UNIFORM = config.Config(model=MODEL)
GAUSSIAN = models.replace(UNIFORM, noise=dict(kind='gaussian', std_end=0.0))


@functools.cache
def build(config):
  """Returns a model and random parameters, for which class, flow and all channels matter."""
  model = farmer.build(config)
  params = models.filled_parameters(model, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))
  rng = np.random.default_rng(1)
  return model, jax.tree.map(lambda a: a + jnp.float32(0.1 * rng.normal(size=a.shape)), params)


@functools.cache
def build_scorer(config, **changes):
  return jax.jit(likelihood.Scorer(build(config)[0], config, **changes))


@pytest.fixture(scope='module')
def source():
  return sources.load(UNIFORM.data, 'valid')


@pytest.fixture(scope='module')
def batch(source):
  return next(iter(pipeline.evaluation_batches(source, 24)))


def score(config, batch, label=None, params=None, **changes):
  params = build(config)[1] if params is None else params
  labels = batch['label'] if label is None else np.full_like(batch['label'], label)
  scores = build_scorer(config, **changes)(params, batch['image'], labels, batch['index'])
  return {name: np.asarray(array, np.float64) for name, array in scores.items()}


def test_known_density_is_scored_exactly(batch):
  """The model has no flow and one Gaussian per token. The bias of the head sets its parameters."""
  changes = dict(flow=dict(blocks=0), prior=dict(components=1), patch_basis='pixels')
  known = models.replace(GAUSSIAN, model=changes)
  params = jax.tree.map(lambda a: a, build(known)[1])  # a copy
  mean, log_scale = np.linspace(-0.5, 0.5, 16), np.linspace(-1, 0.3, 16)
  head = params['prior']['informative_head']
  for name, bias in {'logits': [0.7], 'means': mean, 'log_scales': log_scale}.items():
    kernel = jnp.zeros_like(head[name]['kernel'])
    head[name] = {'kernel': kernel, 'bias': jnp.asarray(bias, jnp.float32)}
  scores = score(known, batch, params=params)
  pixels = batch['image'][..., 0] / 127.5 - 1
  tokens = pixels.reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 16)
  scale = np.exp(log_scale) + known.model.prior.scale_floor
  expected = -stats.norm.logpdf(tokens, mean, scale)
  np.testing.assert_allclose(scores['loss'], expected.sum((1, 2)) / DIMS, rtol=1e-6)
  np.testing.assert_allclose(scores['tokens'], expected.sum(2), rtol=1e-5)
  assert 'loss_importance' not in scores


@pytest.mark.parametrize('conditional_flow', [False, True])
def test_marginal_density_equals_mean_over_classes(batch, conditional_flow):
  """The terms of the loss also add up to the loss."""
  changes = dict(flow=dict(class_conditional=conditional_flow), prior=dict(informative_channels=5))
  marginal = models.replace(UNIFORM, model=changes)
  scores = score(marginal, batch, condition='marginal')
  given = [score(marginal, batch, label)['loss'] for label in range(NUM_CLASSES)]
  log_classes = -DIMS * np.array(given)  # [C, B]
  assert log_classes.std(0).min() > 0.5
  expected = special.logsumexp(log_classes, axis=0) - math.log(NUM_CLASSES)
  np.testing.assert_allclose(-DIMS * scores['loss'], expected, rtol=1e-5)
  np.testing.assert_array_equal(scores['predicted'], log_classes.argmax(0))
  posterior = special.softmax(log_classes, axis=0)
  nll_class = math.log(NUM_CLASSES) - special.entr(posterior).sum(0)
  np.testing.assert_allclose(DIMS * scores['nll_class'], nll_class, atol=1e-3)
  terms = ('nll_informative', 'nll_redundant', 'log_det', 'nll_class')
  np.testing.assert_allclose(sum(scores[name] for name in terms), scores['loss'], atol=1e-5)
  np.testing.assert_allclose(scores['log_dets'].sum(1), scores['log_det'], atol=1e-5)
  np.testing.assert_allclose(scores['tokens'].sum(1) / DIMS, scores['nll_informative'], atol=1e-5)


def test_condition_none_uses_the_label_no_class(batch):
  loss = score(UNIFORM, batch, condition='none')['loss']
  np.testing.assert_allclose(loss, score(UNIFORM, batch, NUM_CLASSES)['loss'], rtol=1e-6)
  assert abs(loss - score(UNIFORM, batch)['loss']).min() > 1e-4


def test_importance_weighting_tightens_the_bound_of_every_image(batch):
  """`loss` is a mean over draws. `loss_importance` is the negative log of the mean density."""
  one, few, many = (score(UNIFORM, batch, draws=draws) for draws in (1, 2, 32))
  assert 'loss_importance' not in one
  for scores in (few, many):
    assert (scores['loss_importance'] <= scores['loss'] + 1e-5).all()
    assert (scores['loss_importance'] < scores['loss'] - 1e-5).mean() > 0.5
  assert many['loss_importance'].mean() < few['loss_importance'].mean()
  second = 2 * few['loss'] - one['loss']
  expected = -special.logsumexp([-DIMS * one['loss'], -DIMS * second], axis=0) + math.log(2)
  np.testing.assert_allclose(few['loss_importance'], expected / DIMS, rtol=1e-5)
  assert abs(score(UNIFORM, batch, seed=1)['loss'] - one['loss']).min() > 0


def test_mean_does_not_depend_on_batch_size_or_padding(source):
  model, params = build(UNIFORM)
  evaluate = validation.LikelihoodEvaluator(model, UNIFORM)
  means = [evaluate(params, pipeline.evaluation_batches(source, size)) for size in (1, 7, 250)]
  for other in means[1:]:
    for name, value in means[0].items():
      np.testing.assert_allclose(other[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
  np.testing.assert_allclose(means[0]['bits_per_dim'], means[0]['loss'] / np.log(2) + 7)


def test_nonfinite_image_counts_and_nonfinite_padding_does_not(batch, monkeypatch):
  evaluation_images = likelihood.noise_lib.evaluation_images

  def with_nan(noise, images, indices, *args):
    values = evaluation_images(noise, images, indices, *args)
    return jnp.where(indices[:, None, None, None] == 3, jnp.nan, values)

  monkeypatch.setattr(likelihood.noise_lib, 'evaluation_images', with_nan)
  model, params = build(GAUSSIAN)
  evaluate = validation.LikelihoodEvaluator(model, GAUSSIAN)
  assert np.isnan(evaluate(params, [batch])['loss'])
  values = evaluate(params, [batch | {'mask': batch['index'] != 3}])
  assert np.isfinite(values['loss'])
  assert 'bits_per_dim' not in values and values['noise_std'] == 0.0


# Scoring of complete sources.


def open_scoring(folder, base=UNIFORM, params=None, **changes):
  base = models.replace(base, likelihood=dict(batch_size=20, examples=40) | changes)
  params = build(UNIFORM)[1] if params is None else params
  return scoring.Scoring(base, epath.Path(folder), params, 3, mesh.LocalDevices())


def report_of(scorer, source):
  rows = scorer.score(source, 'images')
  return scorer.description() | likelihood_summary.summarize(rows)


def test_only_missing_images_are_scored(tmp_path, source, monkeypatch):
  """Scores on disk are reused only with the same images, parameters and settings."""
  bars = mock.Mock(wraps=scoring.terminal.progress_bar)
  monkeypatch.setattr(scoring.terminal, 'progress_bar', bars)
  few = open_scoring(tmp_path, examples=30).score(source, 'images')
  scorer = open_scoring(tmp_path)
  many = scorer.score(source, 'images')
  for name, array in few.items():
    np.testing.assert_array_equal(array, many[name][:30], err_msg=name)
  np.testing.assert_array_equal(many['index'], np.arange(40))
  np.testing.assert_array_equal(many['label'], source.labels[:40])
  other_images = dataclasses.replace(source, images=255 - source.images)
  assert (scorer.score(other_images, 'images')['loss'] != many['loss']).all()
  other_params = jax.tree.map(lambda a: 1.1 * a, build(UNIFORM)[1])
  other = open_scoring(tmp_path, params=other_params).score(source, 'images')
  assert (other['loss'] != many['loss']).all()
  totals_and_numbers_on_disk = [call.args[2:] for call in bars.call_args_list]
  assert totals_and_numbers_on_disk == [(30, 0), (40, 30), (40, 0), (40, 0)]


def test_scores_under_gaussian_noise_have_no_bits_per_dim(tmp_path, source):
  gaussian = models.replace(UNIFORM, noise=dict(kind='gaussian'))
  losses = []
  for std, expected in ((None, '0.005'), (0.3, '0.3')):
    scorer = open_scoring(tmp_path, gaussian, noise_std=std, condition='none')
    report = report_of(scorer, source)
    assert report['unit'] == f'nats/dim at σ = {expected}' and expected in report['density']
    assert not any('bits' in name for name in [*scorer.score(source, 'images'), *report])
    assert 'bits' not in likelihood_summary.to_text(report)
    losses.append(report['loss']['mean'])
  assert losses[0] != losses[1]


def test_change_by_bfloat16_is_reported(tmp_path, source):
  report = report_of(open_scoring(tmp_path, dtype='bfloat16'), source)
  change = report['change_by_dtype']
  assert change['images'] == 20 and 0 < change['largest_nats_per_dim'] < 0.1
  assert f'{change["largest_nats_per_dim"]:.2e}' in likelihood_summary.to_text(report)


def test_nonfinite_images_are_listed(tmp_path, source, monkeypatch):
  original = likelihood.Scorer.__call__

  def with_nan(self, params, images, labels, indices):
    scores = original(self, params, images, labels, indices)
    nonfinite = (indices == 17) | (indices == 33)
    return scores | {'loss': jnp.where(nonfinite, np.nan, scores['loss'])}

  monkeypatch.setattr(likelihood.Scorer, '__call__', with_nan)
  report = report_of(open_scoring(tmp_path), source)
  assert report['nonfinite_images'] == [17, 33]
  assert report['loss']['mean'] is None and report['mean_of_finite'] is not None
  assert '17, 33' in likelihood_summary.to_text(report)
