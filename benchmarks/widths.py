"""Compares the best learning rates of narrow and wide models.

    python -m benchmarks.widths --data=fashion_mnist --data_path=DATA --folder=FOLDER
    python -m benchmarks.widths --data=photos --data_path=CROPS --folder=FOLDER   # photo_crops.py

Trains a flow of two blocks and a prior, with one layer each and 16 tokens per image, for each width
and rate. Prints a Markdown table of held-out bits/dim and draws it to FOLDER/DATA-OPTIMIZER.png.
The command can be interrupted. With the same --folder, it reuses the runs that have finished.
"""

import math
import pathlib
import sys

from absl import app, flags
from etils import epath

from benchmarks import shared_flags, timing, variants
from configs import fashion_mnist, photo_crops
from farmer_jax import config as config_lib
from farmer_jax import terminal
from farmer_jax.errors import UserError
from farmer_jax.evaluation import figures

# Configuration of each dataset, and the patch size with which an image has 16 tokens.
_DATA = {'fashion_mnist': (fashion_mnist, 7), 'photos': (photo_crops, 8)}

_OPTIMIZER = flags.DEFINE_enum('optimizer', 'adamw', ['adamw', 'muon'], 'Optimizer.')
_RATES = flags.DEFINE_list('rates', ['1.5e-3', '3e-3', '6e-3', '1.2e-2'], 'Learning rates.')
_WIDTHS = flags.DEFINE_list('widths', ['128', '256', '512'], 'Widths of the transformers.')


def _steps() -> int:
  return shared_flags.STEPS.value or 100


def _configuration(width: int, rate: float) -> config_lib.Config:
  module, patch_size = _DATA[shared_flags.DATA.value]
  values = module.get_config()
  values.data.path, values.model.patch_size = shared_flags.DATA_PATH.value, patch_size
  values.model.flow.blocks, values.model.flow.layers, values.model.prior.layers = 2, 1, 1
  values.model.flow.width = values.model.prior.width = width
  train, steps = values.train, _steps()
  train.steps, train.validate_every, train.sample_every, train.checkpoint_every = steps, steps, 0, 0
  train.batch_size, train.valid_batch_size, train.valid_examples = 64, 250, 1000
  train.optimizer.kind, train.optimizer.warmup_steps = _OPTIMIZER.value, 20
  train.optimizer.learning_rate = rate
  return config_lib.from_config_dict(values)


def _bits_per_dim(width: int, rate: float) -> float:
  """Trains a model, and returns held-out bits/dim, or infinity if training diverged."""
  name = f'{shared_flags.DATA.value}-{_OPTIMIZER.value}-{width}-{rate:g}-{_steps()}'
  workdir = pathlib.Path(shared_flags.FOLDER.value) / name
  held_out = variants.validate(_configuration(width, rate), workdir)
  return held_out.get('bits_per_dim', math.inf)


def main(argv: list[str]) -> None:
  """Trains all models. Prints the table and draws the figure."""
  del argv
  shared_flags.parse(_DATA)
  rates = list(map(float, _RATES.value))
  figure, axes = figures.plot(1, 1, size=(5, 4))
  panel = axes[0][0]
  try:
    rows = []
    for width in map(int, _WIDTHS.value):
      losses = [_bits_per_dim(width, rate) for rate in rates]
      panel.plot(rates, losses, 'o-', label=f'width {width}')
      cells = {f'{rate:g}': f'{loss:.3f}' for rate, loss in zip(rates, losses, strict=True)}
      rows.append({'width': str(width), **cells})
  except UserError as error:
    terminal.print_error(error)
    sys.exit(1)
  panel.set(xscale='log', xlabel='learning rate', ylabel='held-out bits/dim')
  panel.set_title(f'{shared_flags.DATA.value}, {_OPTIMIZER.value}, {_steps()} steps')
  panel.legend()
  picture = (
    epath.Path(shared_flags.FOLDER.value) / f'{shared_flags.DATA.value}-{_OPTIMIZER.value}.png'
  )
  figures.save_png(picture, figures.to_array(figure))
  timing.print_table(rows)
  print(f'\n{picture}')


if __name__ == '__main__':
  app.run(main)
