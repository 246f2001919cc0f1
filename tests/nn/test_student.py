"""The student: its blocks, and inverses that start from the estimates of the student."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax.nn import student
from farmer_jax.ops import affine
from tests.support import models as tiny

pytestmark = pytest.mark.usefixtures('x64')

SIZE, N, D = 4, 4, 4
LABELS = jnp.asarray([0, 1, 3], jnp.int32)

MODELS = {
  'two blocks': dict(),
  'three blocks': dict(
    blocks=3, final_permutation=False, class_conditional=True, max_log_scale=0.2
  ),
}


@pytest.fixture(
  scope='module', params=[pytest.param('two blocks', marks=pytest.mark.slow), 'three blocks']
)
def case(request, x64):
  """A model with a student, images, and the outputs of its flow blocks."""
  config = tiny.model_config(MODELS[request.param], dict(kind='normal'), scan_unroll=2)
  module, images = student.StudentFarmer(SIZE, 1, 3, config), tiny.normals(3, SIZE, SIZE, 1)
  model, other = (tiny.Compiled(module, images, LABELS, seed=seed) for seed in (0, 1))
  model.params['student'] = other.params['flow']
  return model, images, model('flow_outputs')(images, LABELS)


def test_blocks_map_each_flow_output_to_the_next(case):
  model, images, outputs = case
  z, _ = model('encode')(images, LABELS)
  np.testing.assert_array_equal(outputs[0], model.module.images_to_tokens(images))
  np.testing.assert_allclose(outputs[-1], model.module.final_flow_output(z), atol=1e-12)
  for t in range(model.module.config.flow.blocks):
    found, _ = model('invert_block')(outputs[t + 1], LABELS, t)
    np.testing.assert_allclose(found, outputs[t], atol=1e-10)


def test_student_outputs_equal_its_blocks_in_sequence(case):
  model, _, outputs = case
  section, params = model.module.config.flow, model.params
  estimates, hidden = model('student_outputs')(outputs[-1], LABELS)
  assert hidden.shape == (section.blocks, 3, N - 1, section.width)
  block = tiny.make_block(N, D, student.StudentBlock, max_log_scale=section.max_log_scale)
  condition, z = None, outputs[-1]
  if section.class_conditional:
    condition = params['student']['class_embedding']['embedding'][LABELS]
  invert = jax.jit(functools.partial(block.apply, method='approximate_inverse'))
  for t in reversed(range(section.blocks)):
    block_params = jax.tree.map(lambda p, t=t: p[t], params['student']['stack'])
    z, h = invert({'params': block_params}, z, condition)
    np.testing.assert_allclose(estimates[t], z, atol=1e-12)
    np.testing.assert_allclose(hidden[t], h, atol=1e-12)
  assert abs(estimates[0] - outputs[0]).max() > 0.1


def test_refinement_makes_the_inverse_exact(case):
  model, images, outputs = case
  z = outputs[-1] if model.module.config.flow.final_permutation else outputs[-1][:, ::-1]
  run = functools.partial(model.apply, method='decode_with_student')
  decode = jax.jit(run, static_argnums=(2, 3))
  x, convergence = decode(z, LABELS, 0.0, 0)
  estimates, _ = model('student_outputs')(outputs[-1], LABELS)
  np.testing.assert_allclose(x, model.module.tokens_to_images(estimates[0]), atol=1e-12)
  assert np.isnan(convergence.residual).all() and (convergence.passes == 1).all()
  x, convergence = decode(z, LABELS, 0.0, N)
  np.testing.assert_allclose(x, images, atol=1e-10)
  assert (convergence.residual == 0).all()
  assert abs(decode(z, LABELS, 0.0, 1)[0] - images).max() > 1e-6


def test_parameters_of_the_true_input_invert_a_block():
  """The student learns the shift and log-scale of the true input, which invert a teacher block."""
  x = tiny.normals(3, N, D)
  block = tiny.Compiled(tiny.make_block(N, D, layers=2), x, None)
  z, _ = block()(x, None)
  shift, log_scale, _ = block('affine_parameters')(x, None)
  np.testing.assert_allclose(affine.affine_inverse(z[:, ::-1], shift, log_scale), x, atol=1e-12)
  module = block.module
  block.module = student.StudentBlock(module.flow, module.stack_config, N, D, causal=True)
  estimate, _ = block('approximate_inverse')(z, None)
  assert abs(estimate - x).max() > 0.1


def test_student_block_is_bidirectional():
  """Outputs depend on all tokens of z except the last token of x, which no other token needs."""
  z = tiny.normals(1, N, D)
  block = tiny.Compiled(tiny.make_block(N, D, student.StudentBlock), z, None)
  jacobian = jax.jit(jax.jacfwd(lambda z: block('approximate_inverse')(z, None)[0]))(z)
  depends = (abs(jacobian[0, :, :, 0]) > 1e-6).any((1, 3))[:, ::-1]  # [token of x, token of z]
  expected = np.ones((N, N), bool)
  expected[0] = np.arange(N) == 0
  expected[:, -1] = np.arange(N) == N - 1
  np.testing.assert_array_equal(depends, expected)
