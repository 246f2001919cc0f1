"""Timing variants against one another on machines whose speed drifts."""

import time

import jax
import numpy as np


def medians(variants, repeats):
  """Median seconds of each of the functions in a dict; they take turns."""
  for function in variants.values():
    jax.block_until_ready(function())  # compiles
  times = {name: [] for name in variants}
  for _ in range(repeats):
    for name, function in variants.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[name].append(time.perf_counter() - start)
  return {name: float(np.median(values)) for name, values in times.items()}
