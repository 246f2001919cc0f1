"""Scores the images of a data source on all devices of all processes. A killed job can resume."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax import noise as noise_lib
from farmer_jax import terminal
from farmer_jax.data import base, pipeline, sources
from farmer_jax.distributed import mesh, processes
from farmer_jax.evaluation import likelihood
from farmer_jax.evaluation.likelihood_summary import Rows, png_bits, with_bits
from farmer_jax.nn import farmer
from farmer_jax.workdir import layout, results
from farmer_jax.xla import memory

Params = dict[str, Any]


def load_sources(
  config: config_lib.Config, class_names: Sequence[str] = ()
) -> tuple[base.Source, base.Source | None]:
  """Loads the data source to score and, if configured, the out-of-distribution data source.

  Labels are indices in `class_names`, the classes of the run.
  """
  settings, data = config.likelihood, config.data
  if settings.source is not None:
    # With condition='none', the classes of another dataset do not matter.
    classes = 0 if settings.condition == 'none' else data.num_classes
    data = dataclasses.replace(
      data, source=settings.source, path=settings.path, num_classes=classes
    )
  elif settings.path is not None:
    data = dataclasses.replace(data, path=settings.path)
  source = sources.load(data, settings.split, class_names if data.num_classes else ())
  if settings.ood_source is None:
    return source, None
  # The classes of out-of-distribution images are not classes of the model.
  ood = dataclasses.replace(data, source=settings.ood_source, path=settings.ood_path, num_classes=0)
  return source, sources.load(ood, settings.ood_split)


def scoring_config(config: config_lib.Config) -> config_lib.Config:
  """Returns the configuration with the dtype and the noise of the section `likelihood`."""
  noise = config.noise
  if config.likelihood.noise_std is not None:
    noise = dataclasses.replace(noise, std_end=config.likelihood.noise_std)
  model = dataclasses.replace(config.model, dtype=config.likelihood.dtype)
  return dataclasses.replace(config, model=model, noise=noise)


class Scoring:
  """Scores data sources with the parameters of one checkpoint.

  Each process scores one shard of the images on its own devices and writes the scores to
  WORKDIR/likelihood/rows. A process that was killed resumes from these files.
  """

  def __init__(
    self,
    config: config_lib.Config,
    workdir: epath.Path,
    params: Params,
    step: int,
    devices: mesh.LocalDevices,
  ) -> None:
    """`params`, of the checkpoint at `step`, are on the devices of this process."""
    self._config, self._step = scoring_config(config), step
    self._likelihood, self._noise = config.likelihood, noise_lib.build(self._config.noise)
    self._folder = workdir / 'likelihood' / 'rows'
    self._devices, self._params = devices, params
    # Identifies the parameters. A maximum does not depend on the order of its operands.
    self._maxima = [float(abs(leaf).max()) for leaf in jax.tree.leaves(params)]
    self._scorer = self._build_scorer(self._config)
    self._change_by_dtype: dict[str, Any] | None = None

  def score(self, source: base.Source, description: str) -> Rows:
    """Scores the images of a data source. A progress bar shows `description`.

    Returns in every process arrays with one row for each image, in order: the results of
    `likelihood.Scorer`, `index`, `label`, bits/dim for uniform dequantization, and `png_bits` for
    out-of-distribution detection.
    """
    count = min(len(source), self._likelihood.examples or len(source))
    num_processes, process = jax.process_count(), jax.process_index()
    ends = [count * p // num_processes for p in range(num_processes + 1)]
    open_store = functools.partial(self._open_store, source, base.fingerprint(source))
    store = open_store(process, ends[process])
    usage = functools.partial(memory.of_arrays, 'parameters per device', self._params)
    if ends[process] < ends[process + 1]:
      with self._devices.activate(), memory.attributed(usage):
        self._score_missing(store, source, description, ends[process], ends[process + 1])
    processes.barrier(f'scored {description}')
    parts = []
    for p, (start, end) in enumerate(itertools.pairwise(ends)):
      if end > start:
        store = open_store(p, start)
        parts.append({name: store.read(name, end - start) for name in store.names})
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return with_bits(rows) if self._noise.has_bits_per_dim else rows

  def description(self) -> dict[str, Any]:
    """Describes the computation as a JSON-serializable dict."""
    described = {
      'unit': self._noise.unit,
      'density': self._noise.description,
      'condition': self._likelihood.condition if self._config.data.num_classes else 'none',
      'checkpoint_step': self._step,
      'settings': dataclasses.asdict(self._likelihood),
    }
    change = self._change_by_dtype
    return described | ({'change_by_dtype': change} if change else {})

  def _build_scorer(self, config: config_lib.Config) -> Any:
    settings = self._likelihood
    arguments = settings.draws, settings.condition, settings.seed
    return jax.jit(likelihood.Scorer(farmer.build(config), config, *arguments))

  def _open_store(
    self, source: base.Source, fingerprint: int, process: int, start: int
  ) -> results.ResultFiles:
    """Opens the scores of one process. Other images, parameters or settings have other folders."""
    settings = dataclasses.replace(
      self._likelihood, name=None, batch_size=1, examples=None, path=None, ood_path=None
    )
    key = fingerprint, self._maxima, self._config.noise, settings, process, start
    image, number = source[0]['image'][None], np.zeros(1, np.int32)
    shapes = jax.eval_shape(self._scorer, self._params, image, number, number)
    names = [*shapes, *(['png_bits'] if settings.ood_source else []), 'index', 'label']
    folder = self._folder / f'{self._step}-{layout.short_hash(key)}'
    return results.ResultFiles(folder, {name: name for name in names})

  def _score_missing(
    self, store: results.ResultFiles, source: base.Source, description: str, start: int, end: int
  ) -> None:
    """Scores the images from `start` to `end` - 1 that are not in the store."""
    done, size = len(store), self._devices.round_up(self._likelihood.batch_size)
    data = self._config.data
    batches = functools.partial(pipeline.evaluation_batches, source, size, limit=end, data=data)
    if self._likelihood.dtype == 'bfloat16' and self._change_by_dtype is None:
      self._change_by_dtype = self._compare_dtypes(next(iter(batches(start=start))))
    # Batches start at multiples of their size, as in `sampling.to_disk.draw_missing`.
    to_score = batches(start=start + done - done % size)
    scored: Iterator[Any] = ((batch, self._apply(self._scorer, batch)) for batch in to_score)
    done_images = min(done, end - start)
    with terminal.progress_bar(f'scoring {description}', 'image', end - start, done_images) as bar:
      # The devices compute the next batch at the same time.
      for (batch, scores), _ in itertools.pairwise(itertools.chain(scored, [None])):
        new = batch['mask'] & (batch['index'] >= start + done)
        rows = {**jax.device_get(scores), 'index': batch['index'], 'label': batch['label']}
        rows = {name: array[new] for name, array in rows.items()}
        if 'png_bits' in store.names:
          lengths = base.parallel_map(png_bits, batch['image'][new], data.threads, 'PNG')
          rows['png_bits'] = np.array(list(lengths), np.int64)
        store.append(**rows)
        bar.update(int(new.sum()))
    store.flush()

  def _compare_dtypes(self, batch: base.Batch) -> dict[str, Any]:
    """Returns the change of the scores of a batch from float32 to bfloat16."""
    model = dataclasses.replace(self._config.model, dtype='float32')
    float32_scorer = self._build_scorer(dataclasses.replace(self._config, model=model))
    exact, rounded = (
      np.asarray(self._apply(scorer, batch)['loss'], np.float64)[batch['mask']]
      for scorer in (float32_scorer, self._scorer)
    )
    change = (rounded - exact)[np.isfinite(rounded - exact)]
    return {
      'images': len(change),
      'mean_nats_per_dim': float(change.mean()) if len(change) else None,
      'largest_nats_per_dim': float(abs(change).max(initial=0)),
    }

  def _apply(self, scorer: Any, batch: base.Batch) -> likelihood.Scores:
    arrays = self._devices.shard((batch['image'], batch['label'], batch['index']))
    return scorer(self._params, *arrays)
