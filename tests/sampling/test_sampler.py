"""The sampler: reproducibility, guidance, non-finite images, and inverses of the flow."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from farmer_jax import config, sampling
from farmer_jax.distributed import mesh
from farmer_jax.nn import farmer
from farmer_jax.sampling import inverse
from farmer_jax.sampling import sampler as sampler_lib
from tests.support import models

STACK = dict(layers=1, width=16, head_dim=8)
CONFIG = config.Config(
  data=config.Data(image_size=12),
  model=config.Model(
    patch_size=4,
    flow=config.Flow(blocks=2, **STACK),
    prior=config.Prior(condition_copies=1, components=3, informative_channels=6, **STACK),
  ),
)
MODEL = farmer.build(CONFIG)
# All tests draw batches of this size, so that each sampler is compiled once.
NUMBERS = np.arange(60)
LABELS = NUMBERS % 10

# The guidance scale increases from the first to the last token.
GUIDED = CONFIG.with_sampling(guidance=config.Guidance(scale=0.0, final_scale=3.0))
PLAIN_SAMPLER, GUIDED_SAMPLER = (sampling.Sampler(MODEL, built) for built in (CONFIG, GUIDED))


@pytest.fixture(scope='module')
def params():
  return models.filled_parameters(MODEL, jnp.zeros((1, 12, 12, 1)), jnp.zeros(1, jnp.int32))


@pytest.fixture(scope='module')
def z(params):
  return PLAIN_SAMPLER.latents(params, LABELS, NUMBERS)


@jax.jit
def log_prior(params, z, labels):
  return MODEL.apply({'params': params}, z, labels, method=lambda m, z, c: m.prior(z, c))[0].sum(1)


@pytest.mark.parametrize('sampler', [PLAIN_SAMPLER, GUIDED_SAMPLER], ids=['plain', 'guided'])
def test_image_depends_only_on_number_and_label(params, sampler):
  images = sampler(params, LABELS, NUMBERS)
  assert images.images.shape == (60, 12, 12, 1) and images.images.dtype == np.uint8
  assert images.finite.all() and len(np.unique(images.values, axis=0)) == 60
  np.testing.assert_array_equal(sampler(params, LABELS, NUMBERS).images, images.images)
  others = np.arange(100, 160)
  order = np.concatenate([[24, 11], others[2:]])  # a batch of other images
  few = sampler(params, order % 10, order)
  np.testing.assert_allclose(few.values[:2], images.values[order[:2]], atol=1e-5)
  elsewhere = sampler(params, LABELS, others)
  assert (abs(elsewhere.values - images.values).max((1, 2, 3)) > 1e-3).all()


def test_nonfinite_images_are_reported(params):
  broken = jax.tree.map(lambda a: a, params)
  embedding = params['prior']['class_embedding']['embedding']
  broken['prior']['class_embedding']['embedding'] = embedding.at[2].set(np.nan)
  samples = PLAIN_SAMPLER(broken, LABELS, NUMBERS)
  np.testing.assert_array_equal(samples.finite, LABELS != 2)


def test_max_log_scale_keeps_samples_finite(params, z):
  """Without the bound, these scales overflow float32."""
  wild = jax.tree.map(lambda a: a, params)
  wild['flow']['stack']['log_scale_proj']['bias'] += 60.0
  built = models.replace(CONFIG, model=dict(flow=dict(max_log_scale=20.0)))
  bounded = sampling.Sampler(farmer.build(built), built)
  assert not PLAIN_SAMPLER.images(wild, z, LABELS).finite.any()
  assert bounded.images(wild, z, LABELS).finite.all()


def test_guidance_raises_the_likelihood_ratio(params):
  """log p(z | class) - log p(z | no class) grows with the guidance scale."""

  def ratio(scale):
    z = GUIDED_SAMPLER.latents(params, LABELS, NUMBERS, scales=(scale, scale))
    return (log_prior(params, z, LABELS) - log_prior(params, z, np.full(60, 10))).mean()

  assert ratio(0.0) < ratio(1.0) < ratio(4.0)


def test_guidance_scale_changes_along_the_tokens(params):
  """With scales from 0 to 3, the first token is drawn as without guidance."""
  ramp, none, full = (
    np.asarray(GUIDED_SAMPLER.latents(params, LABELS, NUMBERS, scales=scales))
    for scales in ((0.0, 3.0), (0.0, 0.0), (3.0, 3.0))
  )
  np.testing.assert_array_equal(ramp[:, 0, :6], none[:, 0, :6])
  assert (ramp != full).any() and (ramp != none).any()
  np.testing.assert_array_equal(GUIDED_SAMPLER.latents(params, LABELS, NUMBERS), ramp)


def test_effective_sizes_of_the_pools(params):
  """For the label "no class", p_c = p_u, and all candidates have the same weight."""
  sizes = GUIDED_SAMPLER.effective_sizes(params, LABELS, NUMBERS)
  assert sizes.informative.shape == (60, 9) and sizes.redundant.shape == (60,)
  for fractions, candidates in ((sizes.informative, 10), (sizes.redundant, 256)):
    assert (fractions > 1 / candidates).all() and (fractions < 1).all()
  for fractions in jax.tree.leaves(GUIDED_SAMPLER.effective_sizes(params, [10] * 60, NUMBERS)):
    np.testing.assert_allclose(fractions, 1, rtol=1e-6)
  assert not jax.tree.leaves(PLAIN_SAMPLER.effective_sizes(params, LABELS, NUMBERS))


def test_latents_and_effective_sizes_are_one_program(params, monkeypatch):
  draw = mock.Mock(wraps=sampler_lib.draw_latents)  # is called when the program is traced
  monkeypatch.setattr(sampler_lib, 'draw_latents', draw)
  sampler = sampling.Sampler(MODEL, GUIDED)
  jax.eval_shape(sampler.latents, params, LABELS, NUMBERS)
  jax.eval_shape(sampler.effective_sizes, params, LABELS, NUMBERS)
  assert draw.call_count == 1


def test_redundant_variance_scales_redundant_channels_only(params, z):
  none, one, four = (
    np.asarray(PLAIN_SAMPLER.latents(params, LABELS, NUMBERS, variance=variance))
    for variance in (0.0, 1.0, 4.0)
  )
  np.testing.assert_array_equal(one, z)
  for other in (one, four):
    np.testing.assert_array_equal(other[..., :6], none[..., :6])
  np.testing.assert_allclose(four[..., 6:] - none[..., 6:], 2 * (one - none)[..., 6:], atol=1e-5)
  assert abs(one - none)[..., 6:].max() > 0.1


def test_denoising_adds_the_score(params):
  model = MODEL.clone(config=models.replace(MODEL.config, prior=config.Prior(kind='normal')))
  noise = config.Noise(kind='gaussian', std_end=0.05)
  built = models.replace(CONFIG, sampling=dict(denoise=True), noise=noise)
  z = jax.random.normal(jax.random.key(3), (60, 9, 16))
  before = PLAIN_SAMPLER.images(params, z, LABELS).values
  samples = sampling.Sampler(model, built).images(params, z, LABELS)
  after = samples.values
  np.testing.assert_allclose(samples.noisy, before, atol=1e-6)  # its density is reported

  @jax.jit
  def log_prob(x):
    return model.apply({'params': params}, x, jnp.asarray(LABELS)).total

  # Finite differences along the direction of the score.
  score = np.asarray(after - before) / 0.05**2
  direction = score / np.sqrt((score**2).sum((1, 2, 3), keepdims=True))
  slope = (log_prob(before + 1e-2 * direction) - log_prob(before - 1e-2 * direction)) / 2e-2
  np.testing.assert_allclose(slope, (score * direction).sum((1, 2, 3)), rtol=0.02)


def test_densities_of_samples(params, z):
  """The density of the latents, and the log-determinant of the Jacobian of the inverse."""
  samples = PLAIN_SAMPLER.images(params, z, LABELS)
  found = PLAIN_SAMPLER.densities(params, samples.noisy, LABELS)

  @jax.jit
  @jax.vmap
  def jacobian(z, label):
    def decode(z):
      return MODEL.apply({'params': params}, z[None], label[None], method='decode')[0].ravel()

    return jax.jacfwd(decode)(z).reshape(144, 144)

  jacobians = np.asarray(jacobian(z[:8], jnp.asarray(LABELS[:8])), np.float64)
  log_det = -np.linalg.slogdet(jacobians)[1]
  np.testing.assert_allclose(found['log_det'][:8], -log_det / 144, atol=2e-5)

  prior = jax.jit(
    lambda z, c: MODEL.apply({'params': params}, z, c, method=lambda m, *a: m.prior(*a))
  )
  tokens, redundant = prior(z, jnp.asarray(LABELS))
  total = (tokens.sum(1) + redundant)[:8] + log_det
  np.testing.assert_allclose(found['loss'][:8], -total / 144, atol=2e-5)


# tests/jobs/test_sample.py tests inverse=parallel.
@pytest.mark.parametrize('inverse', ['auto', 'chunked'])
def test_planned_inverse_matches_the_sequential_one(params, z, inverse):
  built = CONFIG.with_sampling(inverse=inverse, chunk_size=3, tolerance=1e-5)
  plan = sampling.plan_inverse(MODEL, built, params, z, LABELS)
  assert plan['difference'] <= 1e-4
  for trial, size in zip(plan['trials'], plan['chunk_sizes'], strict=True):
    assert set(trial) == ({1, 4, 8} if inverse == 'auto' else {1, 3})
    assert trial[1]['error'] == 0 and trial[1]['ms_per_image'] > 0
    if inverse == 'auto':
      assert trial[size]['ms_per_image'] == min(t['ms_per_image'] for t in trial.values())
  if inverse == 'chunked':
    assert plan['chunk_sizes'] == [3, 3]
    planned = sampling.Sampler(MODEL, built, plan['chunk_sizes']).images(params, z, LABELS)
    expected = PLAIN_SAMPLER.images(params, z, LABELS)
    np.testing.assert_allclose(planned.values, expected.values, atol=1e-4)
    assert planned.passes.shape == (2, 60)


@pytest.mark.parametrize('denoises', [False, True])
def test_student_that_differs_from_the_exact_inverse_is_reported(tmp_path, caplog, denoises):
  """A student that removes the noise always differs: refinement does not make it exact."""
  built = CONFIG.with_sampling(inverse='student')
  built = models.replace(built, distill=dict(denoise=denoises))
  devices = mesh.LocalDevices()
  key = inverse._plan_key(built.sampling, 3, devices)
  plan = {'difference': 0.1, 'psnr': 30.0, 'speedup': 2.0}
  (tmp_path / 'inverse_plan.json').write_text(json.dumps({key: plan}))
  found = sampling.cached_measurement(
    built, epath.Path(tmp_path), MODEL, {}, step=3, labels=[0], devices=devices
  )
  assert found == plan and ('exceeds' in caplog.text) != denoises


def test_bfloat16_models_are_inverted_in_float32(params):
  """Decoding recovers images that a float32 model encoded."""
  images = jax.random.uniform(jax.random.key(3), (60, 12, 12, 1), minval=-1)
  encode = jax.jit(
    lambda x: MODEL.apply({'params': params}, x, jnp.asarray(LABELS), method='encode')[0]
  )
  z = encode(images)
  half = MODEL.clone(config=models.replace(MODEL.config, dtype='bfloat16'))

  def error(**settings):
    sampler = sampling.Sampler(half, CONFIG.with_sampling(**settings))
    return abs(sampler.images(params, z, LABELS).values - images).max()

  assert error() < 1e-4
  assert error(dtype='bfloat16') > 3e-3
