"""A model with a distilled student: a second flow that inverts each flow block in one pass.

The student's blocks are like the flow's blocks, with separate parameters and a bidirectional
transformer (arXiv 2510.23588, one-step distillation). `config.Distill` can change their sizes.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from farmer_jax import config as config_lib
from farmer_jax.nn import farmer, flow, layers
from farmer_jax.ops import affine
from farmer_jax.ops.arrays import Condition, Labels, Tokens, Values


class StudentBlock(flow.FlowBlock):
  """Inverts one flow block approximately, in one pass over all tokens."""

  causal: bool = False

  def approximate_inverse(
    self, z: Tokens, condition: Condition
  ) -> tuple[Tokens, Float[Array, 'B n width']]:
    """Maps the output z of a flow block, in reversed order, to an estimate of its input.

    Shift and log-scale are computed from z, as the input is unknown. Also returns the hidden states
    of the n tokens whose shift and log-scale they give: the last N - 1 or all tokens.
    """
    z = z[:, ::-1]
    return self.map_tokens(affine.affine_inverse, z, condition)


class AllTokensBlock(StudentBlock):
  """A student block whose transformer reads all tokens.

  As in the flow, the output at token i affects token i + 1. The output at the last token affects
  the first token. The first token does not change in the flow, and its gain starts at zero, so it
  does not change in a new student either. A trained student can correct it: the estimates of the
  blocks before are not exact, and a student can remove the noise of the image.
  """

  def setup(self) -> None:
    self._make_layers(self.num_tokens, self.channels)
    self.first_token_gain = self.param(
      'first_token_gain',  # of the shift and of the log-scale
      layers.logical_axes(nn.initializers.zeros, None, 'outputs'),
      (2, self.channels),
      layers.param_dtype(self.stack_config.dtype),
    )

  def map_tokens(
    self, function: Any, x: Tokens, condition: Condition
  ) -> tuple[Any, Float[Array, 'B N width']]:
    hidden = self._hidden(x, condition)
    return self._transform(function, hidden, x), jnp.roll(hidden, 1, axis=1)

  def _hidden(self, x: Tokens, condition: Condition) -> Float[Array, 'B N width']:
    return flow.AffineBlock._hidden(self, x, condition)

  def _shift_and_log_scale(self, hidden: Float[Array, 'B N width']) -> tuple[Tokens, Tokens]:
    shift, log_scale = (
      jnp.concatenate([gain * a[:, -1:], a[:, :-1]], axis=1)
      for a, gain in zip(self._project(hidden), self.first_token_gain, strict=True)
    )
    return shift, log_scale


class StudentFlow(flow.Flow):
  """T student blocks, which are applied from the last block to the first."""

  block_class = StudentBlock


class AllTokensFlow(StudentFlow):
  """T student blocks that read all tokens."""

  block_class = AllTokensBlock


class StudentFarmer(farmer.Farmer):
  """A `Farmer` with a student. The parameters are `flow`, `prior` and `student`."""

  distill: config_lib.Distill = config_lib.Distill()

  def setup(self) -> None:
    super().setup()
    flow_class = AllTokensFlow if self.distill.all_tokens else StudentFlow
    self.student = self._make_flow(flow_class, self.student_config)

  @property
  def student_config(self) -> config_lib.Flow:
    """The sizes of the student."""
    return self.distill.student_flow(self.config.flow)

  def init_student(self, z: Tokens, labels: Labels) -> Any:
    """Calls all modules of the student, which creates their parameters."""
    return self.student(z, labels)

  def flow_outputs(self, images: Values, labels: Labels) -> Float[Array, 'outputs B N d']:
    """Returns z⁰ … z^T: the input of each flow block and the output of the last block."""
    x, condition = self.images_to_tokens(images), self.flow.condition(labels)

    def step(z: Array, params: PyTree) -> tuple[Array, Array]:
      z, _ = self.flow.bind_block(params)(z, condition)
      return z, z

    _, outputs = self.flow.scan_blocks(step, x)
    return jnp.concatenate([x[None], outputs])

  def student_outputs(
    self, z_T: Tokens, labels: Labels
  ) -> tuple[Float[Array, 'T B N d'], Float[Array, 'T B n width']]:
    """Returns the student's estimates of z⁰ … z^(T-1) from z^T, and its hidden states."""
    condition = self.student.condition(labels)

    def step(z: Array, params: PyTree) -> tuple[Array, tuple[Array, Array]]:
      z, hidden = self.student.bind_block(params).approximate_inverse(z, condition)
      return z, (z, hidden)

    return self.student.scan_blocks(step, z_T, reverse=True)[1]

  def decode_with_student(
    self, z: Tokens, labels: Labels, tolerance: float = 0.0, refinement_rounds: int = 0
  ) -> tuple[Values, flow.Convergence]:
    """Maps latents to images with the student. Also returns the convergence statistics, [T, B].

    At each block, rounds of fixed-point iteration refine the student's estimate. Enough rounds make
    the inverse exact to within the tolerance. With 0 rounds, the residuals are unknown and nan.
    """
    condition, student_condition = self.flow.condition(labels), self.student.condition(labels)

    def step(z: Array, params: tuple[PyTree, PyTree]) -> Any:
      block_params, student_params = params
      student_block = self.student.bind_block(student_params)
      x, _ = student_block.approximate_inverse(z, student_condition)
      if refinement_rounds:
        chunk, limits = self.num_tokens - 1, dict(start=x, max_rounds=refinement_rounds)
        return self.flow.invert_block(z, block_params, condition, chunk, tolerance, **limits)
      unknown = jnp.full(len(z), jnp.nan, x.dtype)
      return x, flow.Convergence(unknown, jnp.ones_like(unknown))

    params = self.flow.block_params, self.student.block_params
    x, convergence = self.flow.scan_blocks(step, self.final_flow_output(z), params, reverse=True)
    return self.tokens_to_images(x), convergence


def build(config: config_lib.Config) -> StudentFarmer:
  """Returns the model of a configuration, with a student."""
  sizes = config.data.image_size, config.data.channels, config.data.num_classes
  return StudentFarmer(*sizes, config.model, config.distill)


def init_boxed_params(key: PRNGKeyArray, model: StudentFarmer) -> PyTree:
  """Returns random parameters `student`, each in a box with the logical names of its axes."""
  z = jnp.zeros((1, model.num_tokens, model.token_channels))
  labels = jnp.zeros((1,), jnp.int32)
  return model.init(key, z, labels, method='init_student')['params']


def from_teacher(key: PRNGKeyArray, flow_params: PyTree, model: StudentFarmer) -> PyTree:
  """Returns the initial parameters of the student in boxes: a copy of the teacher's parameters.

  A student with another number of layers copies layers at equal distances, from the first to the
  last. A student of another width starts from random values.
  """
  params = init_boxed_params(key, model)['student']
  teacher, student = model.config.flow, model.student_config
  if student.width != teacher.width:
    return params
  chosen = np.linspace(0, teacher.layers - 1, student.layers).round().astype(int)

  def copied(path: tuple[str, ...], box: Any) -> Any:
    a = source.get(path)
    if a is None:  # the gain of the first token
      return box
    if 'transformer' in path and student.layers != teacher.layers:
      a = a[:, chosen]
    if 'in_proj' in path and path[-1] == 'kernel':  # The student does not read neighbors.
      a = a[:, : box.unbox().shape[1]]
    if path[-1] == 'positions':
      a = jnp.concatenate([a, box.unbox()[:, a.shape[1] :]], axis=1)
    return box.replace_boxed(jnp.copy(a))

  source = traverse_util.flatten_dict(flow_params)
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict({path: copied(path, box) for path, box in flat.items()})
