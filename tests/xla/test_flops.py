"""FLOPs compared with the compiler's count and with a rule of thumb; properties of chips."""

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import in256
from farmer_jax import config as config_lib
from farmer_jax.nn import farmer
from farmer_jax.xla import flops
from tests.support import models

CONFIG = config_lib.Config(
  data=config_lib.Data(image_size=16, channels=3),
  model=models.model_config(
    dict(blocks=3, layers=2, width=128, head_dim=32, mlp_ratio=4.0),
    dict(layers=3, width=192, head_dim=32, components=5, mlp_ratio=4.0)
    | dict(informative_channels=20, redundant_components=30, condition_copies=16),
    patch_size=4,
    dtype='float32',
    scan_unroll=12,  # The compiler counts the body of a loop once.
  ),
)


def compiled_flops(config):
  model, data = farmer.build(config), config.data
  params = jax.eval_shape(functools.partial(farmer.init_params, model=model), jax.random.key(0))
  shape = (1, data.image_size, data.image_size, data.channels)
  images, labels = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)

  def density(params, images, labels):
    return model.apply({'params': params}, images, labels).total

  return jax.jit(density).lower(params, images, labels).cost_analysis()['flops']


@pytest.mark.parametrize(
  'flow, prior, changes',
  [
    *(({}, prior, {}) for prior in ({}, dict(informative_channels=0), dict(kind='normal'))),
    ({}, dict(redundant_kind='normal'), {}),
    (dict(kind='coupling'), dict(kind='normal'), {}),
    ({}, dict(kind='normal'), dict(mlp='gated')),
    ({}, {}, dict(neighborhood=True)),
  ],
  ids=str,
)
def test_forward_is_at_least_nine_tenths_of_the_compilers_count(flow, prior, changes):
  """The compiler also counts operations that are no matrix products."""
  config = models.replace(CONFIG, model=dict(flow=flow, prior=prior, **changes))
  compiled = compiled_flops(config)
  assert 0.9 * compiled < flops.forward(config) <= compiled


def test_coupling_block_by_hand():
  """16 tokens of 48 channels: a block reads 24 channels and transforms 24."""
  one, none = (
    flops.forward(models.replace(CONFIG, model=dict(flow=dict(kind='coupling', blocks=blocks))))
    for blocks in (1, 0)
  )
  matrices = 24 * 128 + 128 * 2 * 24 + 2 * (4 * 128 * 128 + 2 * 128 * 512)
  assert one - none == 2 * 16 * (matrices + 2 * 2 * 16 * 128)


def test_neighborhoods_by_hand():
  """Three more tokens at each input: 48 channels in the flow, 20 in the prior. Not in students."""
  near = models.replace(CONFIG, model=dict(neighborhood=True))
  flow, prior = 3 * 2 * 15 * 3 * 48 * 128, 2 * 16 * 3 * 20 * 192
  assert flops.forward(near) - flops.forward(CONFIG) == flow + prior
  distill = dict(job='distill', train=dict(batch_size=10))
  step, near_step = (flops.training_step(models.replace(c, **distill)) for c in (CONFIG, near))
  assert near_step - step == 10 * flow


def test_distillation_by_hand():
  """A student of one layer of width 64 reads 15 or all 16 tokens of 48 channels."""
  teacher, prior = (
    flops.forward(models.replace(CONFIG, model=dict(flow=dict(blocks=blocks)))) for blocks in (3, 0)
  )
  for all_tokens, tokens in ((False, 15), (True, 16)):
    distill = dict(layers=1, width=64, all_tokens=all_tokens)
    config = models.replace(CONFIG, job='distill', distill=distill, train=dict(batch_size=10))
    matrices = 48 * 64 + 64 * 2 * 48 + 4 * 64 * 64 + 2 * 64 * 256
    student = 3 * 2 * tokens * (matrices + 2 * tokens * 64)
    assert flops.training_step(config) == 10 * (teacher - prior + 3 * student)


def test_training_step_is_about_six_times_parameters_times_tokens():
  """Nearly all parameters of this model act on each token."""
  config = config_lib.from_config_dict(in256.get_config('1.1b-p16'))
  flow_parameters, prior_layers = 828e6, 85e6
  expected = 6 * (flow_parameters + prior_layers) * 256 * config.train.batch_size
  assert 1 < flops.training_step(config) / expected < 1.2


def test_longest_prefix_wins_and_unknown_devices_have_no_figures():
  for kind, peak in (
    ('TPU v5 lite', 197e12),
    ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('cpu', None),
  ):
    assert flops.chip(kind).peak_flops == peak
  assert [flops.chip(kind).memory for kind in ('TPU v5 lite', 'cpu')] == [16 * 2**30, None]
  assert [flops.chip(kind).clock for kind in ('TPU v4', 'cpu')] == [1.05e9, None]
