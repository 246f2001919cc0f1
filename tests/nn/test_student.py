"""The student: its blocks, and inverses that start from the estimates of the student."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from farmer_jax import config as config_lib
from farmer_jax.nn import farmer, student
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
  'other sizes': dict(layers=2),
}
DISTILL = {'other sizes': config_lib.Distill(all_tokens=True, layers=1, width=12)}


@pytest.fixture(
  scope='module',
  params=[pytest.param('two blocks', marks=pytest.mark.slow), 'three blocks', 'other sizes'],
)
def case(request, x64):
  """A model with a student, images, and the outputs of its flow blocks."""
  config = tiny.model_config(MODELS[request.param], dict(kind='normal'), scan_unroll=2)
  distill = DISTILL.get(request.param, config_lib.Distill())
  module = student.StudentFarmer(SIZE, 1, 3, config, distill)
  images, z = tiny.normals(3, SIZE, SIZE, 1), jnp.zeros((3, N, D))
  model = tiny.Compiled(module, images, LABELS)
  model.params |= tiny.filled_parameters(module, z, LABELS, seed=1, method='init_student')
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
  section, params = model.module.student_config, model.params
  estimates, hidden = model('student_outputs')(outputs[-1], LABELS)
  all_tokens = model.module.distill.all_tokens
  assert hidden.shape == (section.blocks, 3, N if all_tokens else N - 1, section.width)
  block_class = student.AllTokensBlock if all_tokens else student.StudentBlock
  sizes = dict(width=section.width, max_log_scale=section.max_log_scale)
  block = tiny.make_block(N, D, block_class, **sizes)
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


def test_block_with_all_tokens_is_fully_bidirectional():
  z = tiny.normals(1, N, D)
  block = tiny.Compiled(tiny.make_block(N, D, student.AllTokensBlock), z, None)
  jacobian = jax.jit(jax.jacfwd(lambda z: block('approximate_inverse')(z, None)[0]))(z)
  assert (abs(jacobian[0, :, :, 0]) > 1e-9).all()


def test_block_with_all_tokens_written_out():
  """The output at token i affects token i + 1, and that of the last token affects the first."""
  z = tiny.normals(3, N, D)
  module = tiny.make_block(N, D, student.AllTokensBlock, layers=2, max_log_scale=0.3)
  block = tiny.Compiled(module, z, None)
  params, x = block.params, np.asarray(z[:, ::-1])
  assert params['positions'].shape == (N, 8)
  inputs = x @ params['in_proj']['kernel'] + params['in_proj']['bias'] + params['positions']
  stack = tiny.make_transformer(causal=False, layers=2)
  hidden = np.asarray(stack.apply({'params': params['transformer']}, inputs))
  normed = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6) * params['norm']['scale']
  shift, log_scale = (
    a @ params[name]['kernel'] + params[name]['bias']
    for a, name in ((hidden, 'shift_proj'), (normed, 'log_scale_proj'))
  )
  log_scale = np.where(log_scale > 0, 0.3 * np.tanh(log_scale / 0.3), log_scale)
  gains = params['first_token_gain']
  first = x[:, 0] * np.exp(gains[1] * log_scale[:, -1]) + gains[0] * shift[:, -1]
  others = x[:, 1:] * np.exp(log_scale[:, :-1]) + shift[:, :-1]
  estimate, states = block('approximate_inverse')(z, None)
  np.testing.assert_allclose(estimate, np.concatenate([first[:, None], others], 1), atol=1e-12)
  np.testing.assert_allclose(states, np.roll(hidden, 1, 1), atol=1e-12)


def new_student(neighborhood=False, **settings):
  """Returns a model, random parameters of a teacher of three layers, and those of a student."""
  config = tiny.model_config(dict(layers=3), dict(kind='normal'), neighborhood=neighborhood)
  model = student.StudentFarmer(SIZE, 1, 3, config, config_lib.Distill(**settings))
  teacher = tiny.filled_parameters(model, jnp.zeros((1, SIZE, SIZE, 1)), LABELS[:1])
  boxed = jax.jit(lambda key: student.from_teacher(key, teacher['flow'], model))(jax.random.key(0))
  return model, teacher, nn.unbox(boxed)


def test_new_student_of_all_tokens_copies_the_teacher_and_keeps_the_first_token():
  model, teacher, params = new_student(all_tokens=True)
  assert (params['stack'].pop('first_token_gain') == 0).all()
  positions = params['stack'].pop('positions')
  np.testing.assert_array_equal(positions[:, :-1], teacher['flow']['stack'].pop('positions'))
  assert positions.shape[1] == N and (positions[:, -1] != 0).all()
  jax.tree.map(np.testing.assert_array_equal, params, teacher['flow'])
  model, teacher, params = new_student(all_tokens=True)
  z = tiny.normals(3, N, D)
  estimates, _ = model.apply({'params': {'student': params}}, z, LABELS, method='student_outputs')
  np.testing.assert_array_equal(estimates[1, :, 0], z[:, -1])
  assert (abs(estimates[1, :, 1:] - z[:, -2::-1]) > 1e-3).all()


def test_smaller_student_copies_layers_at_equal_distances():
  _, teacher, params = new_student(layers=2)
  layers = params['stack'].pop('transformer'), teacher['flow']['stack'].pop('transformer')
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:, ::2]), *layers)
  jax.tree.map(np.testing.assert_array_equal, params, teacher['flow'])


@pytest.mark.parametrize('all_tokens', [False, True])
def test_student_does_not_read_the_neighborhoods_of_the_teacher(all_tokens):
  """The student starts with the part of the teacher's matrix that reads the token itself."""
  model, teacher, params = new_student(neighborhood=True, all_tokens=all_tokens)
  kernel = teacher['flow']['stack']['in_proj']['kernel']
  assert kernel.shape[1] == 4 * D
  np.testing.assert_array_equal(params['stack']['in_proj']['kernel'], kernel[:, :D])
  z = tiny.normals(3, N, D)
  both = {'params': {'flow': teacher['flow'], 'student': params}}
  images, _ = model.apply(both, z, LABELS, 0.0, N, method='decode_with_student')
  exact, _ = model.apply(both, z, LABELS, method='decode')
  np.testing.assert_allclose(images, exact, atol=1e-10)


def test_student_of_another_width_starts_as_the_identity():
  model, _, params = new_student(width=4, layers=1, all_tokens=True)
  z = tiny.normals(3, N, D)
  run = {'params': {'student': params}}, z, LABELS
  estimates, hidden = model.apply(*run, method='student_outputs')
  np.testing.assert_array_equal(estimates[::-1], [z[:, ::-1], z])
  assert hidden.shape == (2, 3, N, 4) and (hidden != 0).all()


def test_student_of_the_default_settings_has_the_parameters_of_the_flow():
  """Checkpoints of earlier versions have these parameters."""
  model, teacher, _ = new_student()
  shapes = jax.eval_shape(lambda key: student.init_boxed_params(key, model), jax.random.key(0))
  flow = jax.eval_shape(lambda key: farmer.init_boxed_params(key, model), jax.random.key(0))['flow']
  assert shapes == {'student': flow}
