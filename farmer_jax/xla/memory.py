"""Out of memory: an error of one line that says what takes the memory, and what takes less."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from farmer_jax import config as config_lib
from farmer_jax.errors import OutOfMemoryError

# The settings that take less memory: how to change which key, in order of their cost.
_TRAINING = (
  *(('larger', 'train.accumulation_steps'), ('other', 'model.remat'), ('larger', 'mesh.fsdp')),
  ('smaller', 'train.batch_size'),
)
_SAMPLING = ('smaller', 'sampling.batch_size'), ('larger', 'mesh.tensor')
_REMEDIES = {
  'training': _TRAINING,
  'validation': (('smaller', 'train.valid_batch_size'), ('larger', 'mesh.fsdp')),
  'a grid of samples': (
    *(('smaller', 'sampling.grid_columns'), ('smaller', 'sampling.grid_rows')),
    ('larger', 'mesh.tensor'),
  ),
  'samples during training': _SAMPLING,
  'sampling': _SAMPLING,
  'likelihood': (('smaller', 'likelihood.batch_size'), ('larger', 'mesh.fsdp')),
  'fidelity': (('smaller', 'fidelity.batch_size'), *_SAMPLING),
  'compilation': (*_TRAINING, *_SAMPLING[:1]),
}
_ACTIVITIES = {
  'pretrain': 'training',
  'distill': 'training',
  'sample': 'sampling',
  'compile': 'compilation',
}


@contextlib.contextmanager
def explained(config: config_lib.Config, activity: str | None = None) -> Iterator[None]:
  """Context that raises `OutOfMemoryError` if a device or the host has too little memory.

  `activity` is a key of `_REMEDIES`, by default that of `config.job`. The error may occur when a
  program is compiled, when it runs, when arrays are placed, or when results are fetched.
  """
  try:
    yield
  except Exception as error:
    if not is_exhausted(error):
      raise
    raise OutOfMemoryError(
      _describe(error, config, activity or _ACTIVITIES.get(config.job, config.job))
    ) from error


@contextlib.contextmanager
def attributed(usage: Callable[[], str]) -> Iterator[None]:
  """Context that adds `usage()`, what takes the memory, to an error that `explained` converts."""
  try:
    yield
  except Exception as error:
    if is_exhausted(error):
      error.add_note(usage())
    raise


def is_exhausted(error: BaseException) -> bool:
  """Returns whether an exception says that the memory of a device or of the host is exhausted."""
  if isinstance(error, MemoryError):
    return True
  text = str(error)
  is_text = 'RESOURCE_EXHAUSTED' in text or 'Out of memory' in text
  return isinstance(error, jax.errors.JaxRuntimeError) and is_text


def of_arrays(name: str, tree: PyTree) -> str:
  """Describes the memory that arrays, or their shapes with shardings, take on each device."""
  size = sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )
  return f'{name} {_format(size)}'


class ProgramMemory(NamedTuple):
  """Bytes that a compiled program takes on each device."""

  arguments: int
  temporaries: int
  results: int  # without donated results, which reuse the memory of the arguments

  @property
  def total(self) -> int:
    return sum(self)


def of_program(compiled: jax.stages.Compiled) -> ProgramMemory:
  """Returns the memory that a compiled program takes on each device."""
  memory: Any = compiled.memory_analysis()
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return ProgramMemory(memory.argument_size_in_bytes, memory.temp_size_in_bytes, results)


def describe_program(name: str, compiled: jax.stages.Compiled) -> str:
  """Describes the memory that a compiled program takes on each device."""
  parts = of_program(compiled)._asdict().items()
  return f'{name}: {", ".join(f"{part} {_format(size)}" for part, size in parts)}'


def _describe(error: Exception, config: config_lib.Config, activity: str) -> str:
  remedies = [
    f'a {how} --config.{key} (now {config_lib.get(config, key)})'.replace('a other', 'another')
    for how, key in _REMEDIES[activity]
  ]
  reason = ' '.join(str(error).split())[:200] or 'the host has too little memory'
  usage = ''.join(f'; {note}' for note in getattr(error, '__notes__', ()))
  more = f' or {remedies.pop()}'
  return f'out of memory in {activity} ({reason}{usage}); use {", ".join(remedies)}{more}'


def _format(size: int) -> str:
  return f'{size / 2**30:.2f} GiB' if size >= 2**28 else f'{size / 2**20:.2f} MiB'
