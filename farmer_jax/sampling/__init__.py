"""Draws images from a trained model."""

from farmer_jax.sampling.inverse import cached_measurement, compare_student, plan_inverse
from farmer_jax.sampling.labels import (
  check_no_class,
  class_label,
  grid_labels,
  label_name,
  parse_labels,
)
from farmer_jax.sampling.pools import measure_pools
from farmer_jax.sampling.sampler import (
  Sampler,
  Samples,
  draw_latents,
  draw_values,
  in_sampling_dtype,
)
