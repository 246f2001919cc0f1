"""Draws many images into npz files on all devices of all processes. A killed job can resume."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import PyTree

from farmer_jax import terminal
from farmer_jax.config import Sampling
from farmer_jax.distributed import mesh
from farmer_jax.sampling.sampler import Sampler
from farmer_jax.workdir import layout, results

Report = dict[str, Any]

# Settings that do not change image i.
_NOT_IN_NAME = {'count', 'batch_size', 'png', 'figures', 'densities', 'grid_columns', 'grid_rows'}

# Names of the arrays in the npz files. ADM's sample files have arr_0 [n, H, W, C] and arr_1.
_ARRAYS = {'images': 'arr_0', 'labels': 'arr_1', 'residual': 'residual', 'finite': 'finite'}
# The names and the unit, nats/dim, of --job=likelihood. Both are terms of the loss: -log p(x | c)
# and -log|det dz/dx|. If files lack densities that are needed, their images are drawn again.
DENSITIES = ('loss', 'log_det')


def folder_name(sampling: Sampling, step: int) -> str:
  """Returns the name of the folder of samples: the step and all settings that are not default."""
  return layout.results_name(step, sampling, _NOT_IN_NAME)


def open_results(
  folder: epath.Path, sampling: Sampling, first_file: int = 0
) -> results.ResultFiles:
  """Opens the samples in a folder: the arrays in `_ARRAYS` and, if computed, `DENSITIES`."""
  densities = DENSITIES if sampling.densities else ()
  return results.ResultFiles(folder, {n: n for n in densities} | _ARRAYS, first_file)


def draw_missing(
  sampler: Sampler,
  params: PyTree,
  labels: list[int],
  sampling: Sampling,
  folder: epath.Path,
  devices: mesh.LocalDevices,
) -> dict[str, float] | None:
  """Draws the images 0 … `sampling.count` - 1 that are not yet in `folder`.

  Each process draws the images of a range of files on its active `devices`, which hold `params`.
  Image i has label `labels[i % len(labels)]`.

  Returns:
    Seconds per image of `prior`, `inverse` and `densities`, without compilation, or None if this
    process drew fewer than two batches.
  """
  first_file, start, end = _share_of_process(sampling.count)
  if start >= end:
    return None
  store = open_results(folder, sampling, first_file)
  done = min(start + len(store), end)
  logging.info(f'{done - start} of {end - start} images are already in {folder}')
  size, seconds = devices.round_up(sampling.batch_size), []
  with terminal.progress_bar('sampling', 'image', end - start, done - start) as bar:
    # Batches start at multiples of their size. A resumed job therefore computes the same batches,
    # with the same rounding, as an uninterrupted job.
    for first in range(done - done % size, end, size):
      indices = np.arange(first, first + size, dtype=np.int32)
      batch_labels = np.asarray(labels, np.int32)[indices % len(labels)]
      on_devices = devices.shard((batch_labels, indices))
      times = [time.perf_counter()]
      z = jax.block_until_ready(sampler.latents(params, *on_devices))
      times.append(time.perf_counter())
      samples = jax.block_until_ready(sampler.images(params, z, on_devices[0]))
      times.append(time.perf_counter())
      arrays: dict[str, Any] = vars(samples) | {'labels': batch_labels}
      if sampling.densities:
        arrays |= jax.block_until_ready(sampler.densities(params, samples.noisy, on_devices[0]))
        times.append(time.perf_counter())
      seconds.append(np.diff(times))
      new = (indices >= done) & (indices < end)
      arrays = jax.device_get({name: arrays[name] for name in store.names})
      store.append(**{name: array[new] for name, array in arrays.items()})
      bar.update(int(new.sum()))
    store.flush()
  if len(seconds) < 2:
    return None
  per_image = (np.median(seconds[1:], axis=0) / size).tolist()
  return dict(zip(('prior', 'inverse', 'densities'), per_image, strict=False))


def summarize(folder: epath.Path, sampling: Sampling, **measured: Any) -> Report:
  """Describes the samples in a folder, as a JSON-serializable dict with the values `measured`."""
  store = open_results(folder, sampling)
  nonfinite = np.flatnonzero(~store.read('finite', sampling.count))
  residuals = store.read('residual', sampling.count)
  residuals = residuals[~np.isnan(residuals)]  # A student without refinement has no residuals.
  return {
    'count': sampling.count,
    'nonfinite_samples': len(nonfinite),
    'nonfinite_indices': nonfinite[:100].tolist(),
    'largest_residual': float(residuals.max()) if len(residuals) else None,
    **measured,
    'densities': _summarize_densities(store, sampling) if sampling.densities else None,
    'sampling': dataclasses.asdict(sampling),
  }


def _summarize_densities(store: results.ResultFiles, sampling: Sampling) -> Report:
  """Returns the number of samples with finite densities, and means and standard deviations."""
  values = {name: store.read(name, sampling.count).astype(np.float64) for name in DENSITIES}
  known = np.isfinite(list(values.values())).all(0)
  summary: Report = {
    'count': int(known.sum()),
    'unit': 'nats/dim',
    'density_of': f'samples before {"denoising and " if sampling.denoise else ""}quantization',
  }
  if known.any():
    for name, array in values.items():
      summary[name] = {'mean': float(array[known].mean()), 'std': float(array[known].std())}
  return summary


def _share_of_process(count: int) -> tuple[int, int, int]:
  """Returns the first file, the first image and the end of the images that this process draws."""
  size, num_processes = results.ROWS_PER_FILE, jax.process_count()
  shards = -(-count // size)
  first, end = (shards * (jax.process_index() + i) // num_processes for i in (0, 1))
  return first, first * size, min(end * size, count)
