"""Matrix products set an explicit precision, so that global JAX settings do not change results."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from farmer_jax import config as config_lib
from farmer_jax import losses, sampling
from farmer_jax.evaluation import classifier
from farmer_jax.nn import diagnostics, farmer, student
from tests.support import jaxprs
from tests.support import models as tiny

SIZE = 4
HIGHEST, DEFAULT = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT


def products(function, *args):
  """Returns (operand dtypes, precisions) of all matrix products and convolutions."""
  found = set()
  for equation in jaxprs.equations(jax.make_jaxpr(function)(*args).jaxpr):
    if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
      precision = equation.params['precision']
      precision = precision if isinstance(precision, tuple) else (precision,) * 2
      found.add((tuple(str(v.aval.dtype) for v in equation.invars[:2]), precision))
  assert found
  return found


def programs(dtype):
  """Returns the programs of the jobs: name -> (function, shapes of its arguments)."""
  config = config_lib.Config(
    data=config_lib.Data(image_size=SIZE, channels=1, num_classes=3),
    model=tiny.model_config(dict(class_conditional=True), dtype=dtype, remat='dots'),
    sampling=config_lib.Sampling(guidance=config_lib.Guidance(scale=1.0)),
    distill=config_lib.Distill(objective='hidden', all_tokens=True, perceptual_weight=1.0),
  )
  model = student.build(config)
  both: dict = dict(model=model, config=config)
  images = jax.ShapeDtypeStruct((2, SIZE, SIZE, 1), jnp.float32)
  z = jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)
  labels = jax.ShapeDtypeStruct((2,), jnp.int32)
  batch = {'image': jax.ShapeDtypeStruct(images.shape, jnp.uint8), 'label': labels}
  key = jax.eval_shape(jax.random.key, 0)
  params = jax.eval_shape(functools.partial(farmer.init_params, model=model), key)
  init_student = functools.partial(losses.init_student, model=model)
  trained = nn.unbox(jax.eval_shape(init_student, key, params))

  def call(method, **settings):
    return lambda params, *args: model.apply({'params': params}, *args, **settings, method=method)

  def log_prob(params, images, labels):
    return model.apply({'params': params}, images, labels).total.sum()

  def draw(params, labels):
    keys = jax.random.split(jax.random.key(0), 2)
    return sampling.draw_latents(params, labels, keys, jnp.ones(2), 1.0, **both)

  network = classifier.Classifier(3)
  blank = jnp.zeros((1, SIZE, SIZE, 1), jnp.uint8)
  of_network = jax.eval_shape(lambda key: network.init(key, blank), key)

  def distill(trained, batch, params, of_network):
    features = functools.partial(network.apply, method='hidden_layers')
    loss = functools.partial(losses.distillation_loss, features=features, **both)
    return jax.grad(loss, has_aux=True)(trained, batch, 0, 0, params, of_network)

  coupling = farmer.build(tiny.replace(config, model=dict(flow=dict(kind='coupling'))))
  of_coupling = jax.eval_shape(functools.partial(farmer.init_params, model=coupling), key)

  def encode_and_decode(params, images, labels):
    z, log_dets = coupling.apply({'params': params}, images, labels, method='encode')
    return coupling.apply({'params': params}, z, labels, method='decode')[0].sum() + log_dets.sum()

  with_student = params | {'student': trained['student']}
  refined = call('decode_with_student', refinement_rounds=1)
  ranges = functools.partial(diagnostics.scale_ranges, model)
  return {
    'log-density and its gradients': (jax.value_and_grad(log_prob, (0, 1)), params, images, labels),
    # One block is inverted sequentially, the other block in chunks.
    'inverse': (call('decode', chunk_sizes=(1, 2), tolerance=1e-3), params, z, labels),
    'sampling': (draw, params, labels),
    'coupling flow': (jax.grad(encode_and_decode), of_coupling, images, labels),
    'inverse by the student': (refined, with_student, z, labels),
    'distillation': (distill, trained, batch, params, of_network),
    'diagnostics': (ranges, params, images, labels),
  }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_precision_is_explicit(dtype):
  """The precision is DEFAULT if an operand is bfloat16, otherwise HIGHEST."""
  for name, (function, *args) in programs(dtype).items():
    for dtypes, precision in products(function, *args):
      expected = DEFAULT if 'bfloat16' in dtypes else HIGHEST
      assert precision == (expected,) * 2, (name, dtypes)


def test_implicit_precision_is_detected():
  x = jnp.ones((2, 2))
  assert products(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, 2)[0], x) == {
    (('float32', 'float32'), (None, None))
  }
