"""Flags that several benchmarks have.

Tests import several benchmarks into one process, which can define a flag only once.
"""

import pathlib
import time
from collections.abc import Callable, Collection

from absl import app, flags

DATA = flags.DEFINE_string('data', None, 'Dataset.')
DATA_PATH = flags.DEFINE_string('data_path', None, 'Value of config.data.path.')
FOLDER = flags.DEFINE_string('folder', None, 'Folder of the runs and results.')
STEPS = flags.DEFINE_integer('steps', None, 'Training steps. Default: by the dataset.')
SEEDS = flags.DEFINE_integer('seeds', 2, 'Seeds of each variant.')
_PROCESSOR_TIME = flags.DEFINE_bool(
  'processor_time',
  False,
  'Times are processor time of all threads: for busy machines, with one core (taskset -c 0).',
)
_OUT = flags.DEFINE_string('out', None, 'Folder to create.')
_NAMES = flags.DEFINE_list('variants', None, 'Names of variants. Default: all.')


def parse(datasets: Collection[str], names: Collection[str] = ()) -> list[str]:
  """Checks the flags. Returns the chosen names of variants.

  Raises:
    UsageError: a flag is missing or has an unknown value.
  """
  if DATA.value not in datasets:
    raise app.UsageError(f'set --data to one of {", ".join(datasets)}')
  if not FOLDER.value:
    raise app.UsageError('set --folder')
  if unknown := sorted(set(_NAMES.value or ()) - set(names)):
    raise app.UsageError(f'--variants has {", ".join(unknown)}; known: {", ".join(names)}')
  return list(_NAMES.value or names)


def clock() -> Callable[[], float]:
  """Returns the clock for `timing.medians`."""
  return time.process_time if _PROCESSOR_TIME.value else time.perf_counter


def new_folder() -> pathlib.Path:
  """Returns the folder --out.

  Raises:
    UsageError: --out is not set, or it exists.
  """
  if not _OUT.value:
    raise app.UsageError('set --out')
  if pathlib.Path(_OUT.value).exists():
    raise app.UsageError(f'--out={_OUT.value} exists; choose a new folder')
  return pathlib.Path(_OUT.value)
