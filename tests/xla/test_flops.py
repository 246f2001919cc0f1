"""The count of arithmetic against the compiler's, and against the paper's sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import in256
from farmer_jax import config
from farmer_jax.nn import farmer
from farmer_jax.xla import flops

SMALL = config.Config(
  data=config.Data(image_size=16, channels=3),
  model=config.Model(
    patch_size=4,
    scan_unroll=12,
    flow=config.Flow(blocks=3, layers=2, width=128, head_dim=32),
    prior=config.Prior(
      layers=3,
      width=192,
      head_dim=32,
      components=5,
      informative_channels=20,
      redundant_components=30,
    ),
  ),
)


def compiled_flops(settings):
  model = farmer.build(settings)
  init = functools.partial(farmer.init_params, model=model)
  params = jax.eval_shape(init, jax.random.key(0))
  side, channels = settings.data.image_size, settings.data.channels
  images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
  labels = jax.ShapeDtypeStruct((1,), jnp.int32)

  def density(params, images, labels):
    return model.apply({'params': params}, images, labels).total

  return jax.jit(density).lower(params, images, labels).cost_analysis()['flops']


@pytest.mark.parametrize(
  'prior',
  [
    {},
    dict(informative_channels=0),
    dict(redundant='normal'),
    dict(kind='normal'),
  ],
)
def test_count_is_the_compilers_but_for_what_is_no_product(prior):
  """Loops unrolled, or their bodies would count once."""
  model = dataclasses.replace(SMALL.model, prior=dataclasses.replace(SMALL.model.prior, **prior))
  settings = dataclasses.replace(SMALL, model=model)
  counted, compiled = flops.forward(settings), compiled_flops(settings)
  assert 0.9 * compiled < counted <= compiled


def test_a_step_is_six_times_parameters_and_tokens():
  """The rule of thumb, for a model in which nearly all parameters act on each token."""
  settings = config.from_config_dict(in256.get_config('1.1b-p16'))
  flow_parameters, prior_layers = 828e6, 85e6
  expected = 6 * (flow_parameters + prior_layers) * 256 * settings.train.batch_size
  assert 1 < flops.training_step(settings) / expected < 1.2


def test_peaks():
  assert flops.peak('TPU v5 lite') == 197e12 and flops.peak('TPU v5p') == 459e12
  assert flops.peak('NVIDIA H100 80GB HBM3') == 989e12
  assert flops.peak('cpu') is None
  assert np.isfinite(flops.peak('TPU v6 lite'))
