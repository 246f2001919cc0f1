"""Compares the times of variants on machines whose speed varies. Prints Markdown tables."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


def medians(
  variants: dict[Any, Callable[[], Any]],
  repeats: int,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, float]:
  """Calls the functions in turn, `repeats` times. Returns the median seconds of each function.

  The first call of each function, which compiles, is not timed.
  """
  for function in variants.values():
    jax.block_until_ready(function())
  times: dict[Any, list[float]] = {name: [] for name in variants}
  for _ in range(repeats):
    for name, function in variants.items():
      start = clock()
      jax.block_until_ready(function())
      times[name].append(clock() - start)
  return {name: float(np.median(values)) for name, values in times.items()}


def print_table(rows: Iterable[dict[str, Any]]) -> None:
  """Prints each row {column: cell} of a Markdown table as soon as the row is computed."""
  for number, row in enumerate(rows):
    lines = [row.values()] if number else [row, ['---'] * len(row), row.values()]
    for cells in lines:
      print(f'| {" | ".join(map(str, cells))} |', flush=True)
