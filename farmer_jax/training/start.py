"""Runs that start from another run: from its parameters, or from its whole training state.

`config.init_from` takes parameters. Some of them may be converted: the embeddings of classes follow
the classes, and the embeddings of positions are interpolated to another image size. All other
settings of the model must be equal. `config.branch_from` takes a checkpoint as it is.

WORKDIR/init.json records the source, the checkpoint, and what was taken. A run that has a
checkpoint of its own does not read the source again.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util
from jaxtyping import Array, PRNGKeyArray, PyTree

from farmer_jax import checkpoints, errors, exports
from farmer_jax import config as config_lib
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.distributed import processes
from farmer_jax.nn import farmer, layers
from farmer_jax.ops import patches
from farmer_jax.workdir import layout

_RECORD_FILE = 'init.json'

# Settings that a run must share with the source of its parameters, in addition to the sections of
# the parts that it takes.
_SHARED = (
  *('data.channels', 'model.patch_size', 'model.patch_basis', 'model.mlp', 'model.qk_norm'),
  'model.neighborhood',
)
# Settings that a branch must share with its source, by prefix, and exceptions. The others are those
# of training, which do not change the shapes of the state or the order of the images.
_BRANCH_SHARED = ('seed', 'data.', 'model.', 'train.batch_size', 'train.optimizer.kind')
_BRANCH_IGNORED = ('data.flip', 'model.label_dropout', 'model.dtype')
# Keys that differ between any two runs.
_OWN = ('name', 'init_from', 'init_parts', 'branch_from', 'train.extensions')

Path = tuple[str, ...]
Arrays = dict[Path, Array]


@dataclasses.dataclass(frozen=True)
class Source:
  """Trained parameters.

  Attributes:
    config: the configuration with which they were trained.
    class_names: the names of the classes, or ().
    shapes: their shapes, boxed with the logical names of their axes.
    restore: restore(shapes with shardings, of some of the parameters) -> these parameters.
    record: where they come from, for `init.json`.
    checkpoint: the workdir and the step of the training state, if there is one.
  """

  config: config_lib.Config
  class_names: tuple[str, ...]
  shapes: PyTree
  restore: Callable[[PyTree], PyTree]
  record: dict[str, Any]
  checkpoint: tuple[epath.Path, int] | None = None


def open_source(path: epath.PathLike, step: int | None = None) -> Source:
  """Opens a run, one of its checkpoints, RUN/checkpoints/STEP, or an export. Reads no parameters.

  The default of `step` is the newest checkpoint of a run. An export has one step.

  Raises:
    UserError: there is no such run or checkpoint, or it is a run of `--job=distill`.
  """
  workdir = layout.absolute(path)
  if workdir.name.isdecimal() and workdir.parent.name == 'checkpoints':
    workdir, step = workdir.parent.parent, int(workdir.name)
  config = config_lib.from_config_dict(layout.read_config(workdir))
  if config.teacher is not None:
    raise errors.ConfigError(f'{workdir} is a run of --job=distill; use its teacher')
  name, export = config.train.evaluated_params, layout.read_export(workdir)
  if export:
    if step not in (None, export['step']):
      raise errors.CheckpointError(
        f'the export is of step {export["step"]} now, and was of step {step}; restore it, or use'
        ' another --workdir'
      )
    step = export['step']

    def restore(shapes: PyTree) -> PyTree:
      return exports.restore_params(workdir, shapes)

  else:
    steps = processes.gather(checkpoints.list_steps(workdir))[0]
    if not steps:
      raise errors.CheckpointError(f'{workdir} has no checkpoint')
    if step not in (None, *steps):
      raise errors.CheckpointError(
        f'{workdir} has no checkpoint of step {step}; it has {", ".join(map(str, steps))}'
      )
    step = step or max(steps)

    def restore(shapes: PyTree) -> PyTree:
      return checkpoints.restore_params(workdir, name, shapes, step)[0]

  init = functools.partial(farmer.init_boxed_params, model=farmer.build(config))
  return Source(
    config,
    layout.read_class_names(workdir),
    jax.eval_shape(init, jax.random.key(0)),
    restore,
    {'source': str(workdir), 'step': step, 'parameters': name},
    None if export else (workdir, step),
  )


@dataclasses.dataclass(frozen=True)
class Start:
  """The source from which a run starts, and what the run takes from it.

  Attributes:
    config: the configuration of the run.
    source: the source.
    branch: the workdir and the step of the checkpoint that the run continues, or None.
    parts: the parts of the model that a run that is no branch takes, of 'flow' and 'prior'.
    classes: for each class of the run, its index in the source, or None if it is new.
  """

  config: config_lib.Config
  source: Source
  branch: tuple[epath.Path, int] | None = None
  parts: tuple[str, ...] = ()
  classes: tuple[int | None, ...] = ()

  def restore(self, mesh: mesh_lib.Mesh) -> PyTree:
    """Restores the parameters of the source that the run takes, sharded over a mesh."""
    return self.source.restore(mesh.abstract({p: self.source.shapes[p] for p in self.parts}))

  def convert(self, new: Arrays, old: Arrays) -> dict[Path, tuple[Array, str]]:
    """Returns the first value of each parameter, and where it comes from.

    `new` has random parameters of the run, and `old` the parameters of the source, both by path.
    """
    return {path: self._convert(path, value, old) for path, value in new.items()}

  def _convert(self, path: Path, value: Array, old: Arrays) -> tuple[Array, str]:
    part, kind = path[0], path[-1]
    if part not in self.parts:
      return value, 'new'
    if kind == 'embedding':
      return self._class_embeddings(value, old.get(path))
    if kind == 'positions':
      return self._positions(part, value, old[path])
    if path[-2:] == ('in_proj', 'bias') and part == 'flow':
      had_classes = self.source.config.model.flow.class_conditional
      if had_classes and not self.config.model.flow.class_conditional:
        # A flow adds the embedding of the class to the outputs of this layer.
        no_class = old['flow', 'class_embedding', 'embedding'][-1]
        return old[path] + no_class, 'taken, with the embedding of "no class" added'
    return old[path], 'taken'

  def _class_embeddings(self, value: Array, old: Array | None) -> tuple[Array, str]:
    """Returns embeddings of classes. The last row is "no class"."""
    if old is None:
      return jnp.zeros_like(value), 'zeros, because the flow had no classes'
    source, no_class = self.source.config, len(old) - 1
    is_new = np.array([*(index is None for index in self.classes), False])
    rows = [no_class if index is None else index for index in self.classes] + [no_class]
    taken, like = old[np.array(rows)], 'random'
    if not source.data.num_classes or source.model.label_dropout:
      like = 'like "no class"'
    else:  # The source has not learned "no class".
      taken = jnp.where(is_new[:, None], value, taken)
    if rows == list(range(len(old))):
      return taken, 'taken'
    number = len(self.classes) - is_new.sum()
    origin = f'{number} of {no_class} classes and "no class" taken'
    return taken, f'{origin}, {is_new.sum()} new: {like}' if is_new.any() else origin

  def _positions(self, part: str, value: Array, old: Array) -> tuple[Array, str]:
    """Returns embeddings of positions, interpolated if the image size differs."""
    model, prior = self.config.model, self.config.model.prior
    side, new_side = (
      config.data.image_size // model.patch_size for config in (self.source.config, self.config)
    )
    if side == new_side:
      return old, 'taken'
    copies = prior.condition_copies if part == 'prior' else 0
    tokens = old[..., copies:, :]
    # Without redundant channels, the prior does not read the last token, so that its embedding is
    # random. It is extrapolated, like that of the flow, which has none.
    if part == 'prior' and not prior.has_redundant_mixture(self.config.token_channels) and side > 1:
      tokens = tokens[..., :-1, :]
    resized = patches.resize_positions(tokens, side, new_side)[..., : value.shape[-2] - copies, :]
    origin = f'interpolated from {side}x{side} to {new_side}x{new_side} tokens'
    return jnp.concatenate([old[..., :copies, :], resized], axis=-2), origin

  def origins(self) -> list[tuple[str, int, str]]:
    """Returns the module, the number and the origin of all parameters, by module and origin."""
    init = functools.partial(farmer.init_boxed_params, model=farmer.build(self.config))
    new = _flat(jax.eval_shape(init, jax.random.key(0)))
    origins: dict[Path, str] = {}

    def trace(new: Arrays, old: Arrays) -> None:
      origins.update({path: origin for path, (_, origin) in self.convert(new, old).items()})

    jax.eval_shape(trace, new, _flat(self.source.shapes))
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for path, origin in origins.items():
      suffix = {'positions': ' positions', 'embedding': ' classes'}.get(path[-1], '')
      counts[path[0] + suffix, origin] += new[path].size
    return [(module, count, origin) for (module, origin), count in sorted(counts.items())]

  def announce(self, workdir: epath.Path) -> None:
    """Logs where the run starts, and records it in the workdir."""
    record, rows = dict(self.source.record), []
    what = f'{record["source"]}, step {record["step"]}'
    if self.branch:
      saved = config_lib.to_dict(self.source.config)
      shown = {path for path, key in config_lib.leaves() if not key.changeable} - {*_OWN}
      shown.add('train.extend')
      changed = {k: v for k, v in layout.changes(self.config, saved).items() if k in shown}
      record['changed'], title = changed, f'Branch of {what}, with changes'
      rows = [(key, repr(before), f'-> {now!r}') for key, (before, now) in changed.items()]
    else:
      title = f'First parameters, from the {record["parameters"]} of {what}'
      rows = [(module, f'{count:,}', origin) for module, count, origin in self.origins()]
      record['modules'] = self.origins()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)
    logging.info('\n'.join([f'{title}:', *lines]) if rows else f'{title}: none.')
    processes.on_process_zero(lambda: layout.write_json(workdir / _RECORD_FILE, record))


def open_start(
  config: config_lib.Config, workdir: epath.PathLike, class_names: tuple[str, ...]
) -> Start | None:
  """Opens the source of a run that has no checkpoint yet. Writes nothing, reads no parameters.

  A restarted run takes the checkpoint that it has recorded. `class_names` are those of the run.

  Raises:
    UserError: the source does not exist, or has settings that the run must share.
  """
  key = 'branch_from' if config.branch_from else 'init_from'
  path, workdir = config_lib.get(config, key), layout.absolute(workdir)
  if not path or processes.gather(checkpoints.newest_step(workdir))[0]:
    return None
  record = workdir / _RECORD_FILE
  step = layout.read_json(record, _is_record)['step'] if record.exists() else None
  try:
    source = open_source(path, step)
    if config.branch_from:
      if not source.checkpoint:
        raise errors.ConfigError('an export has no training state; use init_from')
      found = _differences_of_branch(config, source, class_names)
      start = Start(config, source, source.checkpoint)
    else:
      parts = ('flow', 'prior') if config.init_parts == 'all' else (config.init_parts,)
      found = _differences(config, source, parts)
      classes = _classes(config, source, class_names)
      start = Start(config, source, None, tuple(p for p in parts if p in source.shapes), classes)
      if not start.parts:
        found = [f'there are no parameters of the {config.init_parts}']
  except errors.UserError as error:
    raise type(error)(f'--config.{key}={path}: {error}') from error
  if found:
    raise errors.ConfigError(
      f'--config.{key}={path} does not fit this run ({"; ".join(found)}); use the settings of that'
      ' run'
    )
  return start


def init_boxed_params(
  key: PRNGKeyArray, taken: PyTree = None, *, model: farmer.Farmer, start: Start | None
) -> PyTree:
  """Returns the first parameters of a run, boxed with the logical names of their axes.

  `taken` has the result of `start.restore`. Without it, all parameters are random.
  """
  boxed = farmer.init_boxed_params(key, model)
  if start is None or taken is None:
    return boxed
  new = _flat(boxed)
  values = {
    path: value.astype(new[path].dtype)
    for path, (value, _) in start.convert(new, _flat(taken)).items()
  }
  return jax.tree.map(
    lambda box, value: box.replace_boxed(value),
    boxed,
    traverse_util.unflatten_dict(values),
    is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata),
  )


def _differences(config: config_lib.Config, source: Source, parts: Sequence[str]) -> list[str]:
  """Describes the settings that forbid to take parts of the parameters of a source."""
  saved = config_lib.to_dict(source.config)
  prefixes = *_SHARED, *(f'model.{part}.' for part in parts)
  return [
    *layout.differences(config, saved, prefixes, ['model.flow.class_conditional']),
    *_other_precision(config, source),
  ]


def _other_precision(config: config_lib.Config, source: Source) -> list[str]:
  """Describes a difference between the dtypes of parameters, float32 and float64."""
  before, now = source.config.model.dtype, config.model.dtype
  same = layers.param_dtype(before) == layers.param_dtype(now)
  return [] if same else [f'model.dtype is {before!r} there and {now!r} here']


def _differences_of_branch(
  config: config_lib.Config, source: Source, class_names: tuple[str, ...]
) -> list[str]:
  """Describes what forbids to continue the training state of a source."""
  step, saved = source.record['step'], config_lib.to_dict(source.config)
  found = layout.differences(config, saved, _BRANCH_SHARED, _BRANCH_IGNORED)
  found += _other_precision(config, source)
  if bool(config.train.ema_decay) != bool(source.config.train.ema_decay):
    found += layout.differences(config, saved, ['train.ema_decay'])
  if class_names != source.class_names:
    found.append('the classes of the data have other names')
  if config.train.steps <= step:
    raise errors.ConfigError(
      f'train.steps is {config.train.steps}, and the checkpoint has step {step}; set a larger'
      ' number of steps, or name an earlier checkpoint'
    )
  return found


def _classes(
  config: config_lib.Config, source: Source, class_names: tuple[str, ...]
) -> tuple[int | None, ...]:
  """Returns the index in the source of each class: by name if both have names, else by index."""
  number, known = config.data.num_classes, source.config.data.num_classes
  if class_names and source.class_names and number and known:
    index_of = {name: index for index, name in enumerate(source.class_names)}
    return tuple(index_of.get(name) for name in class_names)
  return tuple(index if index < known else None for index in range(number))


def _flat(params: PyTree) -> Arrays:
  """Returns parameters, which can be in boxes, by their paths."""
  return traverse_util.flatten_dict(mesh_lib.unboxed(params))


def _is_record(value: Any) -> bool:
  return isinstance(value, dict) and type(value.get('step')) is int
