"""Drawing images from a trained model."""

from farmer_jax.sampling.sampler import (
  Draws,
  Sampler,
  Samples,
  compare_student,
  draw_latents,
  draw_values,
  grid_labels,
  guidance_scales,
  in_sampling_dtype,
  plan_inverse,
)

__all__ = [
  'Draws',
  'Sampler',
  'Samples',
  'compare_student',
  'draw_latents',
  'draw_values',
  'grid_labels',
  'guidance_scales',
  'in_sampling_dtype',
  'plan_inverse',
]
