"""Drawing: reproducible, independent of the batch, and nothing non-finite passes unseen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax import config, sampling
from farmer_jax.nn import farmer
from farmer_jax.ops import dequantize

CONFIG = config.Config(
  data=config.Data(image_size=12),
  model=config.Model(
    patch_size=4,
    flow=config.Flow(blocks=2, layers=1, width=16, head_dim=8),
    prior=config.Prior(
      layers=1, width=16, head_dim=8, condition_copies=1, components=3, informative_channels=6
    ),
  ),
)
MODEL = farmer.build(CONFIG)
LABELS = np.arange(6) % 10


def with_sampling(**changes):
  return dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, **changes))


GUIDED = with_sampling(guidance=config.Guidance(scale=1.0))


@pytest.fixture(scope='module')
def params():
  fresh = jax.jit(functools.partial(farmer.init_params, model=MODEL))(jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), 100))
  return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), fresh)


def test_grid_has_a_row_a_class():
  labels = sampling.grid_labels(with_sampling(per_class=3))
  np.testing.assert_array_equal(labels, np.repeat(np.arange(10)[:, None], 3, axis=1))
  unconditional = config.Config(data=config.Data(num_classes=0))
  assert sampling.grid_labels(unconditional).max() == 0


@pytest.mark.parametrize('built', [CONFIG, GUIDED], ids=['plain', 'guided'])
def test_image_depends_on_seed_and_number_alone(params, built):
  sampler = sampling.Sampler(MODEL, built)
  images = sampler(params, LABELS, np.arange(6))
  assert images.images.shape == (6, 12, 12, 1) and images.images.dtype == np.uint8
  assert images.finite.all() and len(np.unique(images.values, axis=0)) == 6
  np.testing.assert_array_equal(sampler(params, LABELS, np.arange(6)).images, images.images)
  order = np.asarray([4, 1])  # another batch, another order
  few = sampler(params, LABELS[order], order)
  np.testing.assert_allclose(few.values, images.values[order], atol=1e-5)
  elsewhere = sampler(params, LABELS, np.arange(6) + 1)
  assert (abs(elsewhere.values - images.values).max((1, 2, 3)) > 1e-3).all()
  seeded = dataclasses.replace(built, sampling=dataclasses.replace(built.sampling, seed=1))
  other = sampling.Sampler(MODEL, seeded)(params, LABELS, np.arange(6))
  assert (abs(other.values - images.values).max((1, 2, 3)) > 1e-3).all()


def test_what_is_not_finite_is_reported(params):
  broken = jax.tree.map(lambda a: a, params)
  embedding = params['prior']['class_embedding']['embedding']
  broken['prior']['class_embedding']['embedding'] = embedding.at[2].set(np.nan)
  samples = sampling.Sampler(MODEL, CONFIG)(broken, LABELS, np.arange(6))
  np.testing.assert_array_equal(samples.finite, LABELS != 2)


def test_bounded_scales_keep_exploding_chains_finite(params):
  """Scales that overflow float32 without the bound."""
  wild = jax.tree.map(lambda a: a, params)
  out = wild['flow']['stack']['out_proj']
  out['bias'] = out['bias'].at[..., 16:].add(60.0)
  finite = {}
  for bound in (0.0, 20.0):
    flow = dataclasses.replace(CONFIG.model.flow, max_log_scale=bound)
    built = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, flow=flow))
    samples = sampling.Sampler(farmer.build(built), built)(wild, LABELS, np.arange(6))
    finite[bound] = np.asarray(samples.finite)
  assert not finite[0.0].any() and finite[20.0].all()


def test_guidance_moves_samples_towards_the_class(params):
  """Guided draws are likelier under the class than under none, the more so the larger the scale."""
  numbers = np.arange(200)
  labels = numbers % 10

  @jax.jit
  def advantage(z):
    def log_prob(z, labels):
      tokens, _ = MODEL.apply({'params': params}, z, labels, method=lambda m, z, c: m.prior(z, c))
      return tokens.sum(1)

    return (log_prob(z, jnp.asarray(labels)) - log_prob(z, jnp.full(200, 10))).mean()

  sampler = sampling.Sampler(MODEL, GUIDED)
  values = [
    advantage(sampler.latents(params, labels, numbers, scales=(scale, scale)))
    for scale in (0.0, 1.0, 4.0)
  ]
  assert values[0] < values[1] < values[2]


def test_guidance_may_change_along_the_sequence(params):
  """From 0 to 3: the first token as without guidance, the last as under a scale of 3."""
  sampler = sampling.Sampler(MODEL, GUIDED)
  ramp, none, full = (
    np.asarray(sampler.latents(params, LABELS, np.arange(6), scales=scales))
    for scales in ((0.0, 3.0), (0.0, 0.0), (3.0, 3.0))
  )
  np.testing.assert_array_equal(ramp[:, 0, :6], none[:, 0, :6])
  assert (ramp != full).any() and (ramp != none).any()
  guidance = config.Guidance(scale=0.0, final_scale=3.0)
  configured = sampling.Sampler(MODEL, with_sampling(guidance=guidance))
  np.testing.assert_array_equal(configured.latents(params, LABELS, np.arange(6)), ramp)
  assert sampling.guidance_scales(dataclasses.replace(guidance, method='none')) == (0, 0)


def test_redundant_variance_leaves_informative_channels_alone(params):
  sampler = sampling.Sampler(MODEL, CONFIG)
  z = [
    np.asarray(sampler.latents(params, LABELS, np.arange(6), variance=variance))
    for variance in (0.0, 1.0, 4.0)
  ]
  for other in z[1:]:
    np.testing.assert_array_equal(other[..., :6], z[0][..., :6])
  np.testing.assert_allclose(z[2][..., 6:] - z[0][..., 6:], 2 * (z[1] - z[0])[..., 6:], atol=1e-5)
  assert abs(z[1] - z[0])[..., 6:].max() > 0.1


def test_denoising_moves_up_the_density(params):
  noise = config.Noise(kind='gaussian', std_end=0.05)
  plain = dataclasses.replace(CONFIG, noise=noise)
  built = dataclasses.replace(with_sampling(denoise=True), noise=noise)
  before = sampling.Sampler(MODEL, plain)(params, LABELS, np.arange(6)).values
  after = sampling.Sampler(MODEL, built)(params, LABELS, np.arange(6)).values

  @jax.jit
  def log_prob(x):
    return MODEL.apply({'params': params}, x, jnp.asarray(LABELS)).total

  # The score, by differences along the step itself.
  step = np.asarray(after - before) / 0.05**2
  towards = step / np.sqrt((step**2).sum((1, 2, 3), keepdims=True))
  slope = (log_prob(before + 1e-2 * towards) - log_prob(before - 1e-2 * towards)) / 2e-2
  np.testing.assert_allclose(slope, (step * towards).sum((1, 2, 3)), rtol=0.02)
  assert dequantize.quantize(after, 'gaussian').shape == before.shape


@pytest.mark.parametrize('inverse', ['auto', 'parallel', 'chunked'])
def test_planned_inverse_is_the_sequential_one_within_the_tolerance(params, inverse):
  built = with_sampling(inverse=inverse, chunk=3, tolerance=1e-5)
  sequential = sampling.Sampler(MODEL, built)
  z = sequential.latents(params, LABELS, np.arange(6))
  plan = sampling.plan_inverse(MODEL, built, params, z, LABELS)
  chunks = {'parallel': [8, 8], 'chunked': [3, 3]}.get(inverse, plan['chunks'])
  assert plan['chunks'] == chunks and plan['difference'] <= 1e-4
  for trial, chunk in zip(plan['trials'], chunks, strict=True):
    assert {1, chunk} <= set(trial)
    assert trial[1]['error'] == 0 and trial[1]['ms_per_image'] > 0
    if inverse == 'auto':
      assert set(trial) == {1, 4, 8}
      assert trial[chunk]['ms_per_image'] == min(t['ms_per_image'] for t in trial.values())
  planned = sampling.Sampler(MODEL, built, plan['chunks']).images(params, z, LABELS)
  expected = sequential.images(params, z, LABELS)
  np.testing.assert_allclose(planned.values, expected.values, atol=1e-4)
  assert planned.passes.shape == (2, 6)


def test_models_of_bfloat16_are_inverted_in_float32(params):
  """The latents of a forward pass in float32 come back as the images they are of."""
  images = jax.random.uniform(jax.random.key(3), (6, 12, 12, 1), minval=-1)
  z, _ = MODEL.apply({'params': params}, images, LABELS, method='encode')
  half = MODEL.clone(settings=dataclasses.replace(MODEL.settings, dtype='bfloat16'))

  def error(**settings):
    values = sampling.Sampler(half, with_sampling(**settings)).images(params, z, LABELS).values
    return abs(values - images).max()

  assert error() < 1e-4
  assert error(dtype='bfloat16') > 3e-3
