"""Searches for training settings that reach a lower loss, by successive halving.

    python -m benchmarks.recipe --data=fashion_mnist --data_path=DATA --folder=FOLDER
    python -m benchmarks.recipe --data=photos --data_path=CROPS --folder=FOLDER   # photo_crops.py
    python -m benchmarks.recipe --data=digits --folder=FOLDER --variants=default,adamw,rate×2

A variant changes some settings of the default recipe. All variants train for a few steps. The
better half trains again with twice as many steps, from the start and with its own schedule, and so
on. The last round trains for all steps with several seeds. For each seed, all variants see the
images in the same order.

Prints a Markdown table of held-out bits/dim. The command can be interrupted: the next call with the
same --folder reuses the runs that have finished, and resumes the others.
"""

import dataclasses
import math
import pathlib
import statistics
import sys
from typing import Any

import ml_collections
from absl import app, flags

from benchmarks import shared_flags, timing, variants
from configs import fashion_mnist, photo_crops, quickstart
from farmer_jax import config as config_lib
from farmer_jax import terminal
from farmer_jax.errors import UserError

_DATA = {'digits': quickstart, 'fashion_mnist': fashion_mnist, 'photos': photo_crops}


def _half_of_channels(values: ml_collections.ConfigDict) -> int:
  return values.model.patch_size**2 * values.data.channels // 2


# Changes of the configuration of the dataset, see `variants.set_keys`.
VARIANTS: dict[str, dict[str, Any]] = {
  'default': {},
  'adamw': {'train.optimizer.kind': 'adamw'},
  'muon': {'train.optimizer.kind': 'muon'},
  'rate×2': {'train.optimizer.learning_rate': '×2'},
  'rate×4': {'train.optimizer.learning_rate': '×4'},
  'rate×1/2': {'train.optimizer.learning_rate': '×0.5'},
  'rate×1/4': {'train.optimizer.learning_rate': '×0.25'},
  'b2=0.99': {'train.optimizer.b2': 0.99},
  'muon_momentum=0.9': {'train.optimizer.muon_momentum': 0.9},
  'no weight decay': {'train.optimizer.weight_decay': 0.0},
  'weight decay 0.3': {'train.optimizer.weight_decay': 0.3},
  'no clipping': {'train.optimizer.clip_norm': 0.0},
  'half batch': {'train.batch_size': '×0.5'},
  'warmup×4': {'train.optimizer.warmup_steps': '×4'},
  'ema': {'train.ema_decay': 0.98},
  'no curriculum': {'noise.curriculum_std': 0.0},
  'curriculum×2': {'noise.curriculum_std': '×2'},
  'pixels': {'model.patch_basis': 'pixels'},
  'dct': {'model.patch_basis': 'dct'},
  'normal prior, one more block': {'model.prior.kind': 'normal', 'model.flow.blocks': '+1'},
  'one more block, one prior layer': {'model.prior.layers': 1, 'model.flow.blocks': '+1'},
  'one block fewer, two more prior layers': {
    'model.flow.blocks': '+-1',
    'model.prior.layers': '+2',
  },
  'half of the channels': {'model.prior.informative_channels': _half_of_channels},
  '4×components': {'model.prior.components': '×4'},
  'one condition copy': {'model.prior.condition_copies': 1},
  'gated MLP': {'model.mlp': 'gated'},
  'normalized queries and keys': {'model.qk_norm': True},
  'neighborhood': {'model.neighborhood': True},
  'no final permutation': {'model.flow.final_permutation': False},
}

_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Rounds. Each has twice the steps of the one before.')
_FINALISTS = flags.DEFINE_integer('finalists', 3, 'Smallest number of variants in the last round.')


@dataclasses.dataclass(frozen=True)
class Search:
  """A search on one dataset. Its runs are in `folder`."""

  data: str
  data_path: str | None
  folder: pathlib.Path

  def values(self) -> ml_collections.ConfigDict:
    """Returns the configuration of the dataset, which variants change."""
    return _DATA[self.data].get_config()

  def configuration(self, variant: str, steps: int, seed: int) -> config_lib.Config:
    """Returns the configuration of a run."""
    values = self.values()
    values.seed, values.train.steps, values.data.path = seed, steps, self.data_path
    values.train.validate_every, values.train.sample_every = steps, 0
    values.train.checkpoint_every = max(1, steps // 2)
    variants.set_keys(values, VARIANTS[variant])
    return config_lib.from_config_dict(values)

  def bits_per_dim(self, variant: str, steps: int, seed: int) -> float:
    """Trains a variant, and returns held-out bits/dim, or inf if training diverged."""
    workdir = self.folder / self.data / f'{variant}-{steps}-{seed}'.replace('/', ':')
    metrics = variants.validate(self.configuration(variant, steps, seed), workdir)
    value = metrics.get('bits_per_dim', math.inf)
    return value if math.isfinite(value) else math.inf

  def rows(
    self, names: list[str], steps: int, rounds: int, finalists: int, seeds: int
  ) -> list[dict[str, str]]:
    """Runs the search. Returns the rows of a table, with the best variant first."""
    cells: dict[str, dict[str, str]] = {name: {'variant': name} for name in names}
    order = names
    for halvings in reversed(range(1, rounds)):
      short = steps // 2**halvings
      results = {name: self.bits_per_dim(name, short, seed=0) for name in names}
      for name in cells:
        cells[name][f'{short} steps'] = f'{results[name]:.3f}' if name in results else '–'
      ranked = sorted(names, key=results.__getitem__)
      order = ranked + order[len(ranked) :]
      names = ranked[: max(finalists, math.ceil(len(ranked) / 2))]
    finals = {n: [self.bits_per_dim(n, steps, seed) for seed in range(seeds)] for n in names}
    for name in cells:
      values = finals.get(name)
      cells[name][f'{steps} steps, seeds: {seeds}'] = (
        variants.mean_and_error(values) if values else '–'
      )
    ranked = sorted(names, key=lambda name: statistics.mean(finals[name]))
    return [cells[name] for name in ranked + order[len(ranked) :]]


def main(argv: list[str]) -> None:
  """Runs the search and prints the table."""
  del argv
  names = shared_flags.parse(_DATA, VARIANTS)
  folder = pathlib.Path(shared_flags.FOLDER.value)
  search = Search(shared_flags.DATA.value, shared_flags.DATA_PATH.value, folder)
  steps = shared_flags.STEPS.value or search.values().train.steps
  numbers = _ROUNDS.value, _FINALISTS.value, shared_flags.SEEDS.value
  try:
    timing.print_table(search.rows(names, steps, *numbers))
  except UserError as error:
    terminal.print_error(error)
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
