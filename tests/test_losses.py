"""The distillation loss: errors written out, gradients, and generated images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from farmer_jax import config, losses
from farmer_jax import noise as noise_lib
from farmer_jax.evaluation import classifier
from farmer_jax.nn import farmer
from farmer_jax.nn import student as student_lib
from tests.support import models as tiny
from tests.support.models import replace

B, SIZE = 6, 4
STACK = dict(layers=1, width=8, head_dim=4)
BASE = config.Config(
  data=config.Data(image_size=SIZE, channels=1, num_classes=3),
  noise=config.Noise(kind='gaussian', std_end=0.1),
  model=config.Model(
    patch_size=2,
    dtype='float64',
    flow=config.Flow(blocks=3, **STACK),
    prior=config.Prior(condition_copies=1, components=2, **STACK),
  ),
)
MODEL = student_lib.build(BASE)


def moved(params, size, seed):
  keys = iter(jax.random.split(jax.random.key(seed), 100))
  return jax.tree.map(lambda a: a + size * jax.random.normal(next(keys), a.shape, a.dtype), params)


@pytest.fixture(scope='module')
def teacher(x64):
  """Parameters without zeros."""
  params = jax.jit(functools.partial(farmer.init_params, model=MODEL))(jax.random.key(0))
  return moved(params, 0.3, seed=1)


@pytest.fixture(scope='module')
def images(x64):
  return jax.random.normal(jax.random.key(2), (B, SIZE, SIZE, 1))


@pytest.fixture(scope='module')
def labels(x64):
  return jnp.arange(B) % 3


def build(**settings):
  return student_lib.build(replace(BASE, distill=settings))


def initial(key, teacher, objective, **settings):
  model = build(objective=objective, **settings)
  return nn.unbox(losses.init_student(key, teacher, model=model))


def student(teacher, objective, **settings):
  """A student that has moved away from its teacher."""
  return moved(initial(jax.random.key(4), teacher, objective, **settings), 0.1, seed=3)


@functools.cache
def compiled_loss(**settings):
  changed = replace(BASE, distill=settings)
  model = student_lib.build(changed)
  return jax.jit(functools.partial(losses.distillation_loss, model=model, config=changed))


def loss(params, teacher, images, labels, **settings):
  return compiled_loss(**settings)(params, {'image': images, 'label': labels}, 0, 0, teacher)


def levels(seed):
  return jax.random.randint(jax.random.key(seed), (B, SIZE, SIZE, 1), 0, 256).astype(jnp.uint8)


def test_student_starts_as_a_copy_of_the_teacher(teacher):
  params = initial(jax.random.key(0), teacher, 'outputs')
  assert set(params) == {'student'}
  jax.tree.map(np.testing.assert_array_equal, params['student'], teacher['flow'])


@pytest.mark.parametrize(
  'objective, settings',
  [
    ('outputs', {}),
    ('hidden', {}),
    ('outputs', dict(normalize_targets=True, denoise=True)),
    ('hidden', dict(normalize_targets=True, all_tokens=True)),
  ],
)
def test_errors_written_out(objective, settings, teacher, images, labels):
  params, noise = student(teacher, objective, **settings), 0.2
  model = build(objective=objective, **settings)

  @functools.partial(jax.jit, static_argnames='method')
  def apply(*args, method):
    return MODEL.apply({'params': teacher}, *args, method=method)

  z, outputs = apply(images, labels, method='encode')[0], []
  # The outputs of the teacher's blocks, computed with the exact inverse.
  for block in reversed(range(3)):
    outputs.insert(0, z)
    z = apply(z, labels, block, method='invert_block')[0]
  outputs.insert(0, z)
  np.testing.assert_allclose(MODEL.tokens_to_images(z), images, atol=1e-10)
  run = jax.jit(lambda z: model.apply({'params': params}, z, labels, method='student_outputs'))
  estimates, hidden = run(outputs[3] + noise)
  targets, found = list(outputs[:3]), list(estimates)
  if objective == 'hidden':
    maps = params['alignment']
    for t in (1, 2):
      found[t] = hidden[t] @ maps['kernel'][t - 1] + maps['bias'][t - 1]
      targets[t] = targets[t] if settings else targets[t][:, 1:]
  noise_free = images + 0.3 if 'denoise' in settings else None
  if noise_free is not None:
    targets[0] = MODEL.images_to_tokens(noise_free)
  expected = [((a - b) ** 2).mean((1, 2)) for a, b in zip(found, targets, strict=True)]
  if settings:
    expected[1:] = [expected[t] / (targets[t] ** 2).mean((1, 2)) for t in (1, 2)]
  errors = jax.jit(functools.partial(losses.student_errors, model=model))
  found, final = errors(params, teacher, images, labels, noise, noise_free)
  np.testing.assert_allclose(final, MODEL.tokens_to_images(estimates[0]), rtol=1e-8)
  np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-8)
  assert (found > 1e-3).all()


@pytest.mark.parametrize('objective', ['outputs', 'hidden'])
@pytest.mark.parametrize('normalize', [False, True])
def test_normalized_errors_do_not_depend_on_the_scale_of_latents(
  objective, normalize, images, labels, monkeypatch
):
  """The model has random outputs. Those of block 1 are scaled, for the teacher and the student."""
  outputs, estimates = tiny.normals(4, B, 4, 4), tiny.normals(3, B, 4, 4, seed=1)
  kernel, model = (
    tiny.normals(2, 4, 4, seed=2),
    build(objective=objective, normalize_targets=normalize),
  )

  def errors(scale):
    factors = jnp.asarray([1.0, scale, 1.0])[:, None, None, None]
    scaled = jnp.concatenate([outputs[:3] * factors, outputs[3:]])
    results = {'flow_outputs': scaled, 'student_outputs': (estimates * factors, estimates)}

    def apply(*_, method):
      return results[method]

    monkeypatch.setattr(student_lib.StudentFarmer, 'apply', apply)
    maps = {'kernel': kernel * factors[1:, 0], 'bias': jnp.zeros((2, 1, 1, 4))}
    return losses.student_errors({'alignment': maps}, {}, images, labels, 0.0, model=model)[0]

  one, hundred = np.asarray(errors(1.0)), np.asarray(errors(100.0))
  np.testing.assert_allclose(hundred[[0, 2]], one[[0, 2]], rtol=1e-12)
  np.testing.assert_allclose(hundred[1], one[1] * (1 if normalize else 1e4), rtol=1e-12)


def test_denoising_student_is_compared_with_images_without_noise(teacher, labels):
  """The blocks get the same noisy images with and without the option."""
  settings = dict(all_tokens=True, input_noise_std=0.0)
  params, images = student(teacher, 'outputs', **settings), levels(5)
  _, noisy = loss(params, teacher, images, labels, **settings)
  _, found = loss(params, teacher, images, labels, denoise=True, **settings)
  assert found['loss_block_1'] == noisy['loss_block_1']
  model = build(**settings)
  values = noise_lib.build(BASE.noise).evaluation_images(
    losses.random.named_key(BASE.seed, 'noise', 0, 0), images
  )
  z = model.apply({'params': teacher}, values, labels, method='flow_outputs')[-1]
  estimates, _ = model.apply({'params': params}, z, labels, method='student_outputs')
  exact = np.asarray(images, np.float64) / 127.5 - 1
  error = ((model.tokens_to_images(estimates[0]) - exact) ** 2).mean()
  np.testing.assert_allclose(found['loss_block_0'], error, rtol=1e-6)


@pytest.fixture(scope='module')
def network(x64):
  """Random parameters of a classifier in float64, and its hidden layers."""
  module = classifier.Classifier(3)
  params = tiny.filled_parameters(module, jnp.zeros((1, SIZE, SIZE, 1), jnp.uint8))
  params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
  return {'params': params}, functools.partial(module.apply, method='hidden_layers')


def test_perceptual_errors_and_their_gradient(network):
  params, features = network
  a, b = tiny.normals(3, SIZE, SIZE, 1), tiny.normals(3, SIZE, SIZE, 1, seed=1)
  pairs = [
    (np.asarray(x).reshape(3, -1), np.asarray(y).reshape(3, -1))
    for x, y in zip(features(params, a), features(params, b), strict=True)
  ]
  assert [x.shape[1] for x, _ in pairs] == [4 * 32, 64, 128, 128]
  expected = np.mean([((x - y) ** 2).mean(1) / ((y**2).mean(1) + 1e-6) for x, y in pairs], 0)
  error = functools.partial(losses.perceptual_errors, features, params)
  np.testing.assert_allclose(error(a, b), expected, rtol=1e-10)
  assert (expected > 0.01).all() and (error(a, a) == 0).all()
  jax.test_util.check_grads(
    lambda a: error(jnp.asarray(a), b), (a,), order=1, modes=['rev'], eps=1e-6
  )


def test_perceptual_loss_trains_the_student(network, teacher, labels):
  """Its gradient by the parameters of the student equals a finite difference."""
  # Small weights keep the images in a range in which finite differences are accurate.
  params = jax.tree.map(lambda a: 0.3 * a, student(teacher, 'outputs'))
  images, (frozen, features) = levels(5), network

  @functools.partial(jax.jit, static_argnums=1)
  def run(params, weight):
    model = build(perceptual_weight=weight)
    changed = replace(BASE, distill=dict(perceptual_weight=weight))
    batch = {'image': images, 'label': labels}
    return losses.distillation_loss(
      params, batch, 0, 0, teacher, frozen, model=model, config=changed, features=features
    )

  value, metrics = run(params, 0.5)
  without, _ = loss(params, teacher, images, labels)
  np.testing.assert_allclose(value, without + 0.5 * metrics['loss_perceptual'], rtol=1e-6)

  def perceptual(params):
    return run(params, 0.5)[1]['loss_perceptual']

  direction = tiny.filled_parameters(
    build(), jnp.zeros((1, 4, 4)), jnp.zeros(1, int), method='init_student'
  )
  ends = [
    perceptual(jax.tree.map(lambda a, d, size=size: a + size * d, params, direction))
    for size in (1e-5, -1e-5)
  ]
  gradient = jax.grad(perceptual)(params)
  found = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
  np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-4)
  assert abs(found) > 1e-4


def test_loss_is_the_mean_over_blocks(teacher, labels):
  params = student(teacher, 'outputs')
  value, metrics = loss(params, teacher, levels(5), labels, input_noise_std=0.3)
  blocks = [metrics[f'loss_block_{t}'] for t in range(3)]
  np.testing.assert_allclose(value, np.mean(blocks), rtol=1e-12)
  without, _ = loss(params, teacher, levels(5), labels, input_noise_std=0.0)
  assert abs(value - without) > 1e-4


@pytest.mark.parametrize(
  'objective, settings',
  [('outputs', {}), ('hidden', {}), ('hidden', dict(all_tokens=True, width=4))],
)
def test_every_parameter_gets_a_gradient(objective, settings, teacher, labels):
  params, settings = student(teacher, objective, **settings), dict(objective=objective, **settings)
  gradient = jax.grad(lambda p: loss(p, teacher, levels(5), labels, **settings)[0])(params)
  assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


def test_generated_images_replace_real_ones_if_they_are_finite(teacher, labels):
  """With a prior that generates only infinities, the real images are used."""
  params = student(teacher, 'outputs')
  run = functools.partial(loss, params, teacher, labels=labels)
  half, others = (run(images=levels(seed), generated_fraction=0.5)[0] for seed in (5, 6))
  assert half != others
  all_generated, again = (run(images=levels(seed), generated_fraction=1.0)[0] for seed in (5, 6))
  assert all_generated == again
  broken = teacher | {'prior': jax.tree.map(lambda a: a * jnp.inf, teacher['prior'])}
  found = loss(params, broken, levels(5), labels, generated_fraction=1.0)[0]
  expected = loss(params, teacher, levels(5), labels, generated_fraction=0.0)[0]
  np.testing.assert_allclose(found, expected, rtol=1e-12)
