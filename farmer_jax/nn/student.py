"""A model with a distilled student: a second flow that inverts each flow block in one pass.

The student's blocks have the same shapes as the flow's blocks, separate parameters and a
bidirectional transformer (arXiv 2510.23588, one-step distillation).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from farmer_jax import config as config_lib
from farmer_jax.nn import farmer, flow
from farmer_jax.ops import affine
from farmer_jax.ops.arrays import Condition, Labels, Tokens, Values


class StudentBlock(flow.FlowBlock):
  """Inverts one flow block approximately, in one pass over all tokens."""

  causal: bool = False

  def approximate_inverse(
    self, z: Tokens, condition: Condition
  ) -> tuple[Tokens, Float[Array, 'B N-1 width']]:
    """Maps the output z of a flow block, in reversed order, to an estimate of its input.

    Shift and log-scale are computed from z, as the input is unknown. Also returns hidden states.
    """
    z = z[:, ::-1]
    return self.map_tokens(affine.affine_inverse, z, condition)


class StudentFlow(flow.Flow):
  """T student blocks, which are applied from the last block to the first."""

  block_class = StudentBlock


class StudentFarmer(farmer.Farmer):
  """A `Farmer` with a student. The parameters are `flow`, `prior` and `student`."""

  def setup(self) -> None:
    super().setup()
    self.student = self._make_flow(StudentFlow)

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
  ) -> tuple[Float[Array, 'T B N d'], Float[Array, 'T B N-1 width']]:
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
  data = config.data
  return StudentFarmer(data.image_size, data.channels, data.num_classes, config.model)
