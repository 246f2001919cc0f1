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
  'three blocks, no final permutation, classes, bounded scales': dict(
    blocks=3, final_permutation=False, class_conditional=True, max_log_scale=0.2
  ),
}


@pytest.fixture(
  scope='module', params=[pytest.param('two blocks', marks=pytest.mark.slow), list(MODELS)[1]]
)
def model(request, x64):
  """A model, its parameters with a student, images, and the outputs of its flow blocks."""
  config = tiny.model_config(MODELS[request.param], dict(kind='normal'), scan_unroll=2)
  model = student.StudentFarmer(SIZE, 1, 3, config)
  images = tiny.normals(3, SIZE, SIZE, 1)
  params = tiny.filled_parameters(model, images, LABELS)
  other = tiny.filled_parameters(model, images, LABELS, seed=1)
  params['student'] = other['flow']
  run = functools.partial(model.apply, {'params': params})
  outputs = jax.jit(functools.partial(run, method='flow_outputs'))(images, LABELS)
  return model, params, run, images, outputs


def test_blocks_map_each_flow_output_to_the_next(model):
  model, _, run, images, outputs = model
  z, _ = jax.jit(functools.partial(run, method='encode'))(images, LABELS)
  np.testing.assert_array_equal(outputs[0], model.images_to_tokens(images))
  np.testing.assert_allclose(outputs[-1], model.final_flow_output(z), atol=1e-12)
  invert = jax.jit(functools.partial(run, method='invert_block'))
  for t in range(model.config.flow.blocks):
    np.testing.assert_allclose(invert(outputs[t + 1], LABELS, t)[0], outputs[t], atol=1e-10)


def test_student_outputs_equal_its_blocks_in_sequence(model):
  model, params, run, _, outputs = model
  section = model.config.flow
  estimates, hidden = jax.jit(functools.partial(run, method='student_outputs'))(outputs[-1], LABELS)
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


def test_refinement_makes_the_inverse_exact(model):
  model, _, run, images, outputs = model
  z = outputs[-1] if model.config.flow.final_permutation else outputs[-1][:, ::-1]
  decode = jax.jit(functools.partial(run, method='decode_with_student'), static_argnums=(2, 3))
  x, convergence = decode(z, LABELS, 0.0, 0)
  estimates, _ = jax.jit(functools.partial(run, method='student_outputs'))(outputs[-1], LABELS)
  np.testing.assert_allclose(x, model.tokens_to_images(estimates[0]), atol=1e-12)
  assert np.isnan(convergence.residual).all() and (convergence.passes == 1).all()
  x, convergence = decode(z, LABELS, 0.0, N)
  np.testing.assert_allclose(x, images, atol=1e-10)
  assert (convergence.residual == 0).all()
  assert abs(decode(z, LABELS, 0.0, 1)[0] - images).max() > 1e-6


def test_parameters_of_the_true_input_invert_a_block():
  """The student learns the shift and log-scale of the true input, which invert a teacher block."""
  x = tiny.normals(3, N, D)
  block = tiny.make_block(N, D, layers=2)
  variables = {'params': tiny.filled_parameters(block, x, None)}
  z, _ = jax.jit(block.apply)(variables, x, None)
  parameters = jax.jit(functools.partial(block.apply, method='affine_parameters'))
  shift, log_scale, _ = parameters(variables, x, None)
  np.testing.assert_allclose(affine.affine_inverse(z[:, ::-1], shift, log_scale), x, atol=1e-12)
  block = student.StudentBlock(block.flow, block.stack_config, N, D, causal=True)
  invert = jax.jit(functools.partial(block.apply, method='approximate_inverse'))
  estimate, _ = invert(variables, z, None)
  assert abs(estimate - x).max() > 0.1


def test_student_block_is_bidirectional():
  """Outputs depend on all tokens of z except the last token of x, which no other token needs."""
  z = tiny.normals(1, N, D)
  block = tiny.make_block(N, D, student.StudentBlock)
  variables = {'params': tiny.filled_parameters(block, z, None)}
  jacobian = jax.jit(
    jax.jacfwd(lambda z: block.apply(variables, z, None, method='approximate_inverse')[0])
  )(z)
  depends = (abs(jacobian[0, :, :, 0]) > 1e-6).any((1, 3))[:, ::-1]  # [token of x, token of z]
  expected = np.ones((N, N), bool)
  expected[0] = np.arange(N) == 0
  expected[:, -1] = np.arange(N) == N - 1
  np.testing.assert_array_equal(depends, expected)
