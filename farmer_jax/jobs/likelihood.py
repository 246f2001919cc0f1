"""`--job=likelihood`: scores the images of a split, one by one."""

import dataclasses
import functools
import json

import jax
import numpy as np

from farmer_jax import api, terminal
from farmer_jax.data import base, pipeline, sources
from farmer_jax.distributed import mesh
from farmer_jax.evaluation import figures, likelihood, likelihood_figures, likelihood_summary
from farmer_jax.nn import farmer
from farmer_jax.workdir import layout, results
from farmer_jax.xla import host

# Settings that have no say in what the value of an image is.
_NOT_IN_NAME = {'name', 'source', 'split', 'batch_size'}


def run(config, workdir):
  """Writes WORKDIR/likelihood/<name>.json and .csv, and figures; prints the result."""
  workdir = layout.open_run(config, workdir)
  host.cache_compilations(workdir)
  settings = config.likelihood
  source, other = load_sources(config)
  params, step = _density_of(config, workdir)
  scoring = Scoring(as_scored(config), workdir, params, step)
  rows = scoring.rows(source, 'images')
  other_rows = None if other is None else scoring.rows(other, 'other images')
  if jax.process_index():
    return
  class_names = _class_names(config, workdir)
  report = scoring.description() | likelihood_summary.summarise(rows, class_names)
  pictures = likelihood_figures.draw(rows, source, class_names, report['unit'])
  tables = {'': rows}
  if other_rows is not None:
    names = config.likelihood.source or config.data.source, settings.other_source
    found = likelihood_summary.separation(rows, other_rows, source[0]['image'].size)
    auroc = {name: value for name, (value, *_) in found.items()}
    report['other'] = {
      'source': names[1],
      'auroc': auroc,
      **likelihood_summary.summarise(other_rows),
    }
    tables['-other'] = other_rows
    pictures['other'] = likelihood_figures.separation(found, names)
  name = settings.name or layout.results_name(
    f'{settings.source or config.data.source}-{settings.split}', settings, _NOT_IN_NAME
  )
  folder = workdir / 'likelihood'
  folder.mkdir(parents=True, exist_ok=True)
  for suffix, table in tables.items():
    layout.write_atomically(folder / f'{name}{suffix}.csv', likelihood_summary.to_csv(table))
  for kind, picture in pictures.items():
    figures.save_png(workdir / 'figures' / f'likelihood-{name}-{kind}.png', picture)
  # Last: where it stands, all the rest does.
  layout.write_atomically(folder / f'{name}.json', json.dumps(report, indent=2) + '\n')
  _print_report(report)
  print(f'{folder / name}.json, .csv; {workdir / "figures" / f"likelihood-{name}"}-*.png')


def _density_of(config, workdir):
  """Parameters of the density and their checkpoint's step; a student's run has its teacher's."""
  model = farmer.build(config)
  if config.teacher is None:
    return api.load_params(config, workdir, model)
  params, record = api.load_teacher(config, workdir, model)
  return params, record['step']


def load_sources(config):
  """The images to be scored, and the others, or None: two `data.base.Source`."""
  settings, data = config.likelihood, config.data
  if settings.source is not None:
    # Without a class to be given, what classes they have does not matter.
    classes = 0 if settings.condition == 'none' else data.num_classes
    data = dataclasses.replace(
      data, source=settings.source, path=settings.path, num_classes=classes
    )
  elif settings.path is not None:
    data = dataclasses.replace(data, path=settings.path)
  source, other = sources.load(data, settings.split), None
  if settings.other_source is not None:
    # Their classes, if they have any, are not the model's.
    data = dataclasses.replace(
      data, source=settings.other_source, path=settings.other_path, num_classes=0
    )
    other = sources.load(data, settings.other_split)
  return source, other


def as_scored(config):
  """The configuration with the dtype and the noise that the images are scored with."""
  settings, noise = config.likelihood, config.noise
  if settings.noise_std is not None:
    noise = dataclasses.replace(noise, std_end=settings.noise_std)
  model = dataclasses.replace(config.model, dtype=settings.dtype)
  return dataclasses.replace(config, model=model, noise=noise)


class Scoring:
  """The scores of images of one checkpoint, on all devices of all processes, kept on disk.

  Each process scores a part of the images, on its own devices, and keeps what it has in
  WORKDIR/likelihood/rows: killed, it goes on from there.

  Args:
    config: as `as_scored` returns it.
    workdir: of the run.
    params: of the model.
    step: of the checkpoint.
  """

  def __init__(self, config, workdir, params, step):
    self._config, self._settings, self._step = config, config.likelihood, step
    self._folder = workdir / 'likelihood' / 'rows'
    self._devices = mesh.LocalDevices()
    if config.model.dtype == 'float64':
      params = jax.tree.map(lambda a: a.astype(np.float64), params)
    self._params = self._devices.replicate(params)
    # Maxima are exact in any order.
    self._weights = [float(abs(leaf).max()) for leaf in jax.tree.leaves(params)]
    self._score = self._compiled(config)
    self._change = None

  def _compiled(self, config):
    settings = self._settings
    return jax.jit(
      likelihood.Scorer(
        farmer.build(config), config, settings.draws, settings.condition, settings.seed
      )
    )

  def rows(self, source, what):
    """Scores the images of a `data.base.Source`; returns a dict of arrays, an entry an image, in
    order: what `likelihood.Scorer` finds, `index`, `label` and what `summary` adds."""
    count = min(len(source), self._settings.examples or len(source))
    processes = jax.process_count()
    ends = [count * p // processes for p in range(processes + 1)]
    own, contents = jax.process_index(), base.contents(source)
    store = self._store(source, contents, own, ends[own])
    if ends[own] < ends[own + 1]:
      self._fill(store, source, what, ends[own], ends[own + 1])
    processes.wait_for_all(f'scored {what}')
    stores = [self._store(source, contents, p, start) for p, start in enumerate(ends[:-1])]
    parts = [
      {name: store.read(name, end - start) for name in store.names}
      for store, start, end in zip(stores, ends[:-1], ends[1:], strict=True)
      if end > start
    ]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return likelihood_summary.with_bits(rows) if self._config.noise.kind == 'uniform' else rows

  def _store(self, source, contents, process, start):
    """Where a process keeps the scores of the images from `start` on: apart from those of other
    images, weights and settings."""
    settings = dataclasses.replace(
      self._settings, name=None, batch_size=1, examples=None, path=None, other_path=None
    )
    about = contents, self._weights, self._config.noise, settings, process, start
    shapes = jax.eval_shape(self._score, self._params, *self._arguments(_first(source)))
    names = [*shapes, *(['png_bits'] if settings.other_source else []), 'index', 'label']
    folder = self._folder / f'{self._step}-{layout.fingerprint(about)}'
    return results.Shards(folder, {name: name for name in names})

  def _arguments(self, batch):
    return batch['image'], batch['label'], batch['index']

  def _fill(self, store, source, what, start, end):
    """Scores what is missing of the images from `start` to `end`."""
    settings, done = self._settings, len(store)
    size = self._devices.batch_size(settings.batch_size)
    threads = self._config.data.threads
    batches = functools.partial(pipeline.valid_batches, source, size, threads=threads)
    if settings.dtype == 'bfloat16' and what == 'images' and self._change is None:
      self._change = self._change_by_dtype(next(iter(batches(limit=end, start=start))))
    pending = None
    with terminal.progress(f'scoring {what}', 'image', end - start, min(done, end - start)) as bar:
      # Batches begin where they did before, so that a job that goes on repeats the same arithmetic.
      for batch in batches(limit=end, start=start + done - done % size):
        batch['mask'] &= batch['index'] >= start + done
        found = self._score(self._params, *self._devices.split(self._arguments(batch)))
        if pending:  # meanwhile the devices work
          bar.update(self._keep(store, *pending))
        pending = batch, found
      if pending:
        bar.update(self._keep(store, *pending))
    store.flush()

  def _keep(self, store, batch, found):
    """Adds the scores of a batch; returns how many."""
    rows = jax.device_get(found) | {'index': batch['index'], 'label': batch['label']}
    rows = {name: array[batch['mask']] for name, array in rows.items()}
    if 'png_bits' in store.names:
      images = batch['image'][batch['mask']]
      lengths = base.parallel_map(
        likelihood_summary.png_bits, images, self._config.data.threads, 'PNG'
      )
      rows['png_bits'] = np.array(list(lengths), np.int64)
    store.append(**rows)
    return len(rows['index'])

  def _change_by_dtype(self, batch):
    """What computing in bfloat16 does to the scores of a batch."""
    wide = dataclasses.replace(
      self._config, model=dataclasses.replace(self._config.model, dtype='float32')
    )
    arguments = self._params, *self._devices.split(self._arguments(batch))
    losses = [score(*arguments)['loss'] for score in (self._compiled(wide), self._score)]
    exact, rounded = (np.asarray(loss, np.float64)[batch['mask']] for loss in losses)
    change = (rounded - exact)[np.isfinite(rounded - exact)]
    return {
      'images': len(change),
      'mean_nats_per_dim': float(change.mean()) if len(change) else None,
      'largest_nats_per_dim': float(abs(change).max(initial=0)),
    }

  def description(self):
    """What was computed, a dict for JSON."""
    config, settings = self._config, self._settings
    uniform = config.noise.kind == 'uniform'
    described = {
      'unit': 'bits/dim' if uniform else f'nats/dim at σ = {config.noise.std_end:g}',
      'density': (
        'uniformly dequantised images: a bound on the length of a lossless code'
        if uniform
        else f'images in [-1, 1] with Gaussian noise of standard deviation {config.noise.std_end:g}'
      ),
      'condition': settings.condition if config.data.num_classes else 'none',
      'checkpoint_step': self._step,
      'settings': dataclasses.asdict(settings),
    }
    return described | ({'change_by_dtype': self._change} if self._change else {})


def _first(source):
  return next(iter(pipeline.valid_batches(source, 1, limit=1)))


def _class_names(config, workdir):
  """A name for each class, its number where it has no other."""
  names = layout.read_class_names(workdir)
  return names or tuple(map(str, range(config.data.num_classes)))


def _print_report(report):
  unit = report['unit']
  headline = report.get('bits_per_dim', report['loss'])
  for name, value in (
    ('Likelihood', headline),
    ('Importance-weighted', report.get('bits_per_dim_importance')),
  ):
    if value and value['mean'] is not None:
      error = '' if value['standard_error'] is None else f' ± {value["standard_error"]:.4f}'
      print(f'{name} ({report["count"]} images): {value["mean"]:.4f}{error} {unit}')
  if report['nonfinite_images']:
    shown = ', '.join(map(str, report['nonfinite_images'][:20]))
    print(f'Not finite: {len(report["nonfinite_images"])} images, numbers {shown}')
  if 'accuracy' in report:
    print(f'Accuracy of the class of highest likelihood: {report["accuracy"]:.4f}')
  change = report.get('change_by_dtype')
  if change and change['images']:
    print(
      f'bfloat16 moved the first {change["images"]} images by'
      f' {change["mean_nats_per_dim"]:+.2e} nats/dim on average, at most'
      f' {change["largest_nats_per_dim"]:.2e}'
    )
  for name, value in report.get('other', {}).get('auroc', {}).items():
    print(f'Told from {report["other"]["source"]} by {name}: AUROC {value:.4f}')
