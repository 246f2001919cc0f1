"""The whole model, its relatives, its dtypes and its published sizes."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs import in256
from farmer_jax import config, losses
from farmer_jax.nn import farmer
from farmer_jax.ops import patches
from tests.support import models as tiny

pytestmark = pytest.mark.usefixtures('x64')

SIZE, CHANNELS, CLASSES = 4, 1, 3
N = D = 4  # 2 × 2 tokens of 2 × 2 pixels
INFORMATIVE = 2
LABELS = jnp.asarray([0, 1, 0, CLASSES], jnp.int32)

# (flow, prior) settings of what the model turns into when parts of it are left out.
RELATIVES = {
  'no redundant channels': ({}, dict(informative_channels=0)),
  'one component, one condition copy': (
    {},
    dict(components=1, redundant_components=1, condition_copies=1),
  ),
  'no flow': (dict(blocks=0), {}),
  'tarflow': (dict(blocks=3), dict(kind='normal')),
  'jetformer': (dict(final_permutation=False), dict(redundant='normal')),
  'class-conditional flow': (dict(class_conditional=True), {}),
}


@pytest.fixture(scope='module', params=list(RELATIVES))
def relative(request, x64):
  """A relative, and all it says about one image with four labels."""
  settings = tiny.model_settings(*RELATIVES[request.param])
  model = farmer.Farmer(SIZE, CHANNELS, CLASSES, settings)
  images = jnp.broadcast_to(tiny.normals(1, SIZE, SIZE, CHANNELS), (4, SIZE, SIZE, CHANNELS))
  params = {'params': tiny.filled_parameters(model, images, LABELS, seed=4)}

  def compiled(method):
    return jax.jit(functools.partial(model.apply, params, method=method))

  encode, decode = compiled('encode'), compiled('decode')

  @jax.jit
  def draw(seed, labels):
    draws = tiny.make_draws(seed, len(labels), N)
    return model.apply(params, labels[None], draws, method='sample_latents')

  z, log_dets = encode(images, LABELS)
  return types.SimpleNamespace(
    flow=settings.flow,
    prior=settings.prior,
    images=np.asarray(images),
    encode=encode,
    sample=lambda seed, labels: decode(draw(seed, labels), labels)[0],
    z=np.asarray(z),
    log_dets=np.asarray(log_dets),
    decoded=np.asarray(decode(z, LABELS)[0]),
    log_density=jax.tree.map(np.asarray, jax.jit(model.apply)(params, images, LABELS)),
  )


def test_terms_add_up(relative):
  log_density, blocks = relative.log_density, relative.flow.blocks
  assert log_density.log_dets.shape == (blocks, 4)
  for term in (log_density.informative, log_density.redundant, log_density.total):
    assert term.shape == (4,) and np.isfinite(term).all()
  np.testing.assert_array_equal(log_density.log_dets, relative.log_dets)
  assert (log_density.log_dets != 0).all()
  terms = losses.nll_terms(log_density, SIZE * SIZE * CHANNELS)
  expected = log_density.informative + log_density.redundant + log_density.log_dets.sum(0)
  np.testing.assert_allclose(terms['loss'], -expected / 16, rtol=1e-12)
  parts = terms['nll_informative'] + terms['nll_redundant'] + terms['log_det']
  np.testing.assert_allclose(terms['loss'], parts, rtol=1e-12)


def test_decoding_undoes_encoding(relative):
  assert relative.z.shape == (4, N, D)
  np.testing.assert_allclose(relative.decoded, relative.images, atol=1e-10)
  if relative.flow.blocks:
    assert abs(relative.z - patches.patchify(relative.images, 2)).max() > 0.1
  else:
    np.testing.assert_array_equal(relative.z, patches.patchify(relative.images, 2))


def test_label_reaches_the_parts_that_are_conditional_and_no_others(relative):
  flow, prior, log_density = relative.flow, relative.prior, relative.log_density
  has_redundant = prior.informative_channels > 0 and prior.kind == 'mixture'
  conditional = {
    'z': flow.class_conditional,
    'informative': flow.class_conditional or prior.kind == 'mixture',
    'redundant': has_redundant and (flow.class_conditional or prior.redundant == 'mixture'),
  }
  values = dict(z=relative.z, informative=log_density.informative, redundant=log_density.redundant)
  for name, value in values.items():
    np.testing.assert_allclose(value[0], value[2], atol=1e-12)  # the same label
    for a, b in ((0, 1), (0, 3), (1, 3)):
      difference = abs(value[a] - value[b]).max()
      assert difference > 1e-4 if conditional[name] else difference < 1e-12, name


def test_standard_normal_parts(relative):
  """What is left without a learned density is that of standard normals, to the last constant."""
  prior, z, log_density = relative.prior, relative.z, relative.log_density
  if prior.kind == 'normal':
    np.testing.assert_allclose(log_density.informative, stats.norm.logpdf(z).sum((1, 2)))
    assert (log_density.redundant == 0).all()
  elif prior.informative_channels == 0:
    assert (log_density.redundant == 0).all()
  else:
    normal = stats.norm.logpdf(z[..., INFORMATIVE:]).sum((1, 2))
    difference = abs(log_density.redundant - normal)
    assert (difference < 1e-12).all() if prior.redundant == 'normal' else (difference > 0.1).all()


def test_samples_belong_to_the_density(relative):
  """Right shape, finite; and encoded again, the normal parts among them are standard normal."""
  normal_from = D if relative.prior.redundant == 'mixture' else INFORMATIVE
  normal_from = 0 if relative.prior.kind == 'normal' else normal_from
  labels = LABELS if normal_from == D else jnp.tile(LABELS, 500)
  images = relative.sample(0, labels)
  assert images.shape == (len(labels), SIZE, SIZE, CHANNELS)
  assert np.isfinite(images).all()
  assert len(np.unique(images)) == images.size
  if normal_from < D:
    z = np.asarray(relative.encode(images, labels)[0])
    for column in z[..., normal_from:].reshape(len(labels), -1).T:
      assert stats.kstest(column, 'norm').pvalue > 1e-4


def shapes_of(model, dtype):
  """Shapes and dtypes of the parameters, and of what each method makes of four images."""
  images = jax.ShapeDtypeStruct((4, SIZE, SIZE, CHANNELS), dtype)
  z = jax.ShapeDtypeStruct((4, N, D), dtype)
  labels = jax.ShapeDtypeStruct((4,), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images, labels)

  def shapes(method, *args):
    return jax.eval_shape(functools.partial(model.apply, method=method), variables, *args)

  def sample(model):
    return model.sample_latents(jnp.zeros((1, 4), int), tiny.make_draws(0, 4, N))

  return (
    variables,
    shapes('__call__', images, labels),
    shapes('encode', images, labels),
    shapes('decode', z, labels),
    shapes(sample),
  )


@pytest.mark.parametrize(
  'dtype, kind',
  [('bfloat16', 'mixture'), ('bfloat16', 'normal'), ('float32', 'mixture'), ('float64', 'mixture')],
)
def test_dtypes(dtype, kind):
  """Parameters and results are float32 whatever the transformers compute in, unless that is more.

  64-bit types are on, so a dtype forgotten anywhere shows.
  """
  settings = tiny.model_settings(dict(class_conditional=True), dict(kind=kind), dtype=dtype)
  model = farmer.Farmer(SIZE, CHANNELS, CLASSES, settings)
  expected = 'float64' if dtype == 'float64' else 'float32'
  for leaf in jax.tree.leaves(shapes_of(model, expected)):
    assert leaf.dtype == expected, leaf


def test_half_precision_is_close_to_full():
  """bfloat16 transformers: float32 results, all finite, off by no more than their rounding."""

  def everything(model, images):
    z, log_dets = model.encode(images, LABELS)
    mixtures = model.prior.mixtures(z[..., :INFORMATIVE], LABELS)
    return z, log_dets, mixtures, model.decode(z, LABELS)[0]

  results = {}
  with jax.enable_x64(False):
    images = jnp.asarray(tiny.normals(4, SIZE, SIZE, CHANNELS), jnp.float32)
    for dtype in ('bfloat16', 'float32'):
      model = farmer.Farmer(SIZE, CHANNELS, CLASSES, tiny.model_settings(dtype=dtype))
      params = {'params': tiny.filled_parameters(model, images, LABELS)}
      results[dtype] = jax.jit(functools.partial(model.apply, method=everything))(params, images)
  for leaf in jax.tree.leaves(results):
    assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
  np.testing.assert_allclose(results['bfloat16'][-1], images, atol=0.05)
  np.testing.assert_allclose(results['float32'][-1], images, atol=1e-5)
  jax.tree.map(
    lambda half, full: np.testing.assert_allclose(half, full, atol=0.1),
    results['bfloat16'][:3],
    results['float32'][:3],
  )


@pytest.mark.parametrize(
  'variant, part, millions',
  [
    ('1.1b-p16', 'flow', 828),
    ('1.1b-p16', 'prior', 295),
    ('1.9b-p16', 'flow', 1397),
  ],
)
def test_published_parameter_counts(variant, part, millions):
  """To 3 %. The larger prior is left out: counted this way it exceeds the published 498 million."""
  built = config.from_config_dict(in256.get_config(variant))
  params = jax.eval_shape(
    functools.partial(farmer.init_params, model=farmer.build(built)), jax.random.key(0)
  )
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[part]))
  assert count / 1e6 == pytest.approx(millions, rel=0.03)


def test_memory_and_speed_settings_leave_checkpoints_alone():
  def shapes(**changes):
    model = farmer.Farmer(SIZE, CHANNELS, CLASSES, tiny.model_settings(**changes))
    images = jnp.zeros((1, SIZE, SIZE, CHANNELS), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images, LABELS[:1])
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)

  expected = shapes(dtype='float32')
  assert shapes(dtype='bfloat16', remat='full') == expected
  assert shapes(dtype='float32', remat='dots', scan_unroll=4) == expected


@pytest.mark.parametrize('blocks, final', [(0, True), (1, True), (1, False), (2, True), (3, False)])
def test_tokens_are_in_raster_order(blocks, final):
  """The flow being the identity, the token that the prior reads last changes no density but its
  own; which one that is depends on how often the order was turned round."""
  settings = tiny.model_settings(
    dict(blocks=blocks, final_permutation=final), dict(informative_channels=0)
  )
  model = farmer.Farmer(SIZE, CHANNELS, 3, settings)
  images = tiny.normals(1, SIZE, SIZE, CHANNELS)
  label = jnp.zeros(1, jnp.int32)
  params = tiny.filled_parameters(model, images, label)
  if blocks:
    out = params['flow']['stack']['out_proj']
    params['flow']['stack']['out_proj'] = jax.tree.map(jnp.zeros_like, out)

  def tokens(images):
    return model.apply({'params': params}, images, label).tokens[0]

  turned = (blocks - (blocks > 0 and not final)) % 2 == 1
  # Turned round, the first patch of the raster is read last.
  last = 0 if turned else N - 1
  changed_images = images.at[:, 0 if turned else -1, 0 if turned else -1].add(1.0)
  changed = np.asarray(abs(tokens(changed_images) - tokens(images)) > 1e-9)
  np.testing.assert_array_equal(changed, np.arange(N) == last)
