"""The distillation loss: errors written out, gradients, and generated images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax import config, losses
from farmer_jax.nn import farmer
from farmer_jax.nn import student as student_lib
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


@pytest.mark.parametrize('objective', ['outputs', 'hidden'])
def test_errors_written_out(objective, teacher, images, labels):
  params, noise = student(teacher, objective), 0.2

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
  run = jax.jit(lambda z: MODEL.apply({'params': params}, z, labels, method='student_outputs'))
  estimates, hidden = run(outputs[3] + noise)
  expected = [((estimates[t] - outputs[t]) ** 2).mean((1, 2)) for t in range(3)]
  if objective == 'hidden':
    maps = params['alignment']
    for t in (1, 2):
      aligned = hidden[t] @ maps['kernel'][t - 1] + maps['bias'][t - 1]
      expected[t] = ((aligned - outputs[t][:, 1:]) ** 2).mean((1, 2))
  errors = functools.partial(losses.student_errors, model=build(objective=objective))
  found, final = jax.jit(errors)(params, teacher, images, labels, noise)
  np.testing.assert_allclose(final, MODEL.tokens_to_images(estimates[0]), rtol=1e-8)
  np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-8)
  assert (found > 1e-3).all()


def test_loss_is_the_mean_over_blocks(teacher, labels):
  params = student(teacher, 'outputs')
  value, metrics = loss(params, teacher, levels(5), labels, input_noise_std=0.3)
  blocks = [metrics[f'loss_block_{t}'] for t in range(3)]
  np.testing.assert_allclose(value, np.mean(blocks), rtol=1e-12)
  without, _ = loss(params, teacher, levels(5), labels, input_noise_std=0.0)
  assert abs(value - without) > 1e-4


@pytest.mark.parametrize('objective', ['outputs', 'hidden'])
def test_every_parameter_gets_a_gradient(objective, teacher, labels):
  params = student(teacher, objective)
  gradient = jax.grad(lambda p: loss(p, teacher, levels(5), labels, objective=objective)[0])(params)
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
