"""Ablations of the model: what each part of FARMER contributes, on small data.

    python -m benchmarks.ablations --data=emoji --data_path=EMOJI --folder=FOLDER
    python -m benchmarks.ablations --data=photos --data_path=CROPS --folder=FOLDER

All variants are trained for the same number of steps with the same images, for several seeds.
Prints a Markdown table of held-out nats/dim and, for data with classes, of the quality of samples
without and with guidance, by the features of a classifier. Draws the likelihoods and Fréchet
distances to FOLDER/DATA.png. The command can be interrupted: with the same --folder, it reuses the
results that it has.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any

import jax
from absl import app, flags
from etils import epath

from benchmarks import sample_quality, shared_flags, timing, variants
from configs import emoji, photo_crops
from farmer_jax import api, sampling, terminal
from farmer_jax import config as config_lib
from farmer_jax.errors import UserError
from farmer_jax.evaluation import figures
from farmer_jax.workdir import layout

# Configurations, and their changes to models that train in minutes on a CPU.
_SMALL = {
  'model.flow.layers': 1,
  'model.flow.width': 128,
  'model.prior.layers': 2,
  'model.prior.width': 128,
  'model.prior.components': 16,
  'model.prior.redundant_components': 16,
  'train.steps': 400,
  'train.batch_size': 64,
}
_DATA = {
  'emoji': (lambda: emoji.get_config('32-p8'), _SMALL),
  'photos': (
    photo_crops.get_config,
    {'train.steps': 250, 'model.flow.blocks': 4, 'model.prior.informative_channels': 16},
  ),
}

_WITHOUT_PERMUTATION = {'model.flow.final_permutation': False}
_ONE_COPY = _WITHOUT_PERMUTATION | {'model.prior.condition_copies': 1}

# The paper adds its parts one by one. The other variants change one setting of the full model.
VARIANTS: dict[str, dict[str, Any]] = {
  'flow and prior': _ONE_COPY | {'model.prior.informative_channels': 0},
  '+ redundant channels': _ONE_COPY,
  '+ copies of the condition': _WITHOUT_PERMUTATION,
  '+ final permutation: the full model': {},
  'all channels informative': {'model.prior.informative_channels': 0},
  'half as many informative channels': {'model.prior.informative_channels': '×0.5'},
  'twice as many informative channels': {'model.prior.informative_channels': '×2'},
  'one component': {'model.prior.components': 1, 'model.prior.redundant_components': 1},
  'K_I / 4': {'model.prior.components': '×0.25'},
  'K_I × 4': {'model.prior.components': '×4'},
  'one redundant component': {'model.prior.redundant_components': 1},
  'K_R × 4': {'model.prior.redundant_components': '×4'},
  'redundant channels: standard normal': {'model.prior.redundant_kind': 'normal'},
  'tokens of pixels': {'model.patch_basis': 'pixels'},
  'coupling flow (Jet)': {'model.flow.kind': 'coupling'},
  'no flow': {'model.flow.blocks': 0},
  'TARFlow: standard normal prior': {
    'model.prior.kind': 'normal',
    'model.flow.class_conditional': lambda values: values.data.num_classes > 0,
    'model.flow.blocks': '+2',
    'sampling.guidance.scale': 0.0,
  },
}

# Guidance of samples: column, settings.
_GUIDANCE = {
  'no guidance': config_lib.Guidance(),
  'component-wise': config_lib.Guidance(method='component', scale=1.0),
  'resampling': config_lib.Guidance(method='resample', scale=0.5),
}

_COUNT = flags.DEFINE_integer('samples', 2000, 'Samples for each kind of guidance.')
_BATCH_SIZE = flags.DEFINE_integer('sample_batch', 250, 'Samples drawn at once.')


@dataclasses.dataclass(frozen=True)
class Ablations:
  """Trains variants and measures their samples. All results are in `folder`."""

  data: str
  data_path: str | None
  folder: epath.Path
  steps: int | None = None  # None: by the dataset
  seeds: int = 2
  count: int = 2000  # samples for each kind of guidance
  batch_size: int = 250  # samples drawn at once

  def configuration(self, variant: str, seed: int) -> config_lib.Config:
    """Returns the configuration of a run."""
    make, small = _DATA[self.data]
    values = make()
    variants.set_keys(values, small)
    variants.set_keys(values, VARIANTS[variant])
    values.seed, values.data.path, values.train.sample_every = seed, self.data_path, 0
    values.train.steps = steps = self.steps or values.train.steps
    values.train.validate_every, values.train.checkpoint_every = steps, steps
    return config_lib.from_config_dict(values)

  @functools.cached_property
  def evaluator(self) -> sample_quality.SampleEvaluator | None:
    """Compares samples with the training images. None for data without classes."""
    data = self.configuration(next(iter(VARIANTS)), 0).data
    if not data.num_classes:
      return None
    return sample_quality.SampleEvaluator(data, self.folder / 'classifier', reference='train')

  def result(self, variant: str, seed: int) -> dict[str, Any]:
    """Returns the result of a run: 'nats' per dimension, 'parameters', and the sample quality."""
    config = self.configuration(variant, seed)
    # Results of other settings have other names.
    settings = layout.short_hash((config_lib.to_dict(config), self.count))
    name = f'{variant}-{seed}-{settings}'.replace('/', ':')
    file = self.folder / 'results' / f'{name}.json'
    if file.exists():
      return json.loads(file.read_text())
    workdir = self.folder / name
    held_out = variants.validate(config, pathlib.Path(workdir))
    result: dict[str, Any] = {'nats': held_out.get('loss', math.inf)}
    if held_out:
      run = api.load(workdir)
      result['parameters'] = sum(leaf.size for leaf in jax.tree.leaves(run.params))
      # The classes of samples have the frequencies of the training images.
      if self.evaluator:
        labels = self.evaluator.training_images(self.count)['label']
        for column, guidance in _GUIDANCE.items():
          if guidance.active and config.model.prior.kind == 'normal':
            continue  # Guidance acts on the prior, which has no classes here.
          sampler = sampling.Sampler(run.model, run.config.with_sampling(guidance=guidance))
          images, nonfinite = sample_quality.draw(sampler, run.params, labels, self.batch_size)
          quality = self.evaluator(images, labels)
          result[column] = quality._asdict() | {'nonfinite': nonfinite}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))
    return result

  def row(self, variant: str) -> dict[str, str]:
    """Returns the row of a variant in the table, with standard errors over the seeds."""
    results = [self.result(variant, seed) for seed in range(self.seeds)]
    millions = results[0].get('parameters', math.nan) / 1e6
    nats = variants.mean_and_error([result['nats'] for result in results], 4)
    row = {'variant': variant, 'parameters': f'{millions:.2f} M', 'nats/dim': nats}
    if self.evaluator:
      for column in _GUIDANCE:
        for name, digits in (('distance', 2), ('precision', 2), ('recall', 2), ('accuracy', 2)):
          values = [result[column][name] for result in results if column in result]
          row[f'{column}: {name}'] = variants.mean_and_error(values, digits) if values else '–'
    return row


def draw_figure(file: epath.Path, rows: list[dict[str, str]]) -> None:
  """Draws likelihoods and Fréchet distances of the table, with their standard errors."""
  columns = [name for name in rows[0] if name == 'nats/dim' or name.endswith('distance')]
  size = 3 + 2.5 * len(columns), 1 + 0.3 * len(rows)
  figure, axes = figures.plot(1, len(columns), size, sharey=True)
  names = [row['variant'] for row in reversed(rows)]
  axes[0][0].set_yticks(range(len(names)), names)
  for panel, column in zip(axes[0], columns, strict=True):
    cells = [row[column].split(' ± ') for row in reversed(rows)]
    numbers = [math.nan if cell[0] == '–' else float(cell[0]) for cell in cells]
    errors = [float(cell[1]) if len(cell) > 1 else 0.0 for cell in cells]
    panel.errorbar(numbers, range(len(names)), xerr=errors, fmt='o', capsize=2)
    panel.set_title(column.replace(': distance', '\nFréchet distance'))
    panel.grid(axis='x')
  figures.save_png(file, figures.to_array(figure))


def main(argv: list[str]) -> None:
  """Trains all variants. Prints the table and draws the figure."""
  del argv
  names = shared_flags.parse(_DATA, VARIANTS)
  folder = epath.Path(shared_flags.FOLDER.value)
  numbers = shared_flags.STEPS.value, shared_flags.SEEDS.value, _COUNT.value, _BATCH_SIZE.value
  data = shared_flags.DATA.value
  ablations = Ablations(data, shared_flags.DATA_PATH.value, folder / data, *numbers)
  try:
    if ablations.evaluator:
      print(f'Accuracy of the classifier on held-out images: {ablations.evaluator.accuracy:.3f}\n')
    rows: list[dict[str, str]] = []
    for name in names:
      rows.append(ablations.row(name))
    timing.print_table(rows)
    picture = folder / f'{data}.png'
    draw_figure(picture, rows)
    print(f'\n{picture}')
  except UserError as error:
    terminal.print_error(error)
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
