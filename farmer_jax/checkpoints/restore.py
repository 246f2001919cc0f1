"""Reading checkpoints back: the newest that is whole, and no other numbers than were written.

Orbax restores a flipped bit as a wrong number, so everything is compared with the checksums that
were written along. Nothing in a checkpoint is ever executed: TensorStore reads the arrays, and
everything else is JSON.
"""

import json
import re

import jax
import orbax.checkpoint as ocp
from etils import epath

from farmer_jax import errors, terminal
from farmer_jax.checkpoints import checksums
from farmer_jax.distributed import agreement

FOLDER = 'checkpoints'
STATE, DATASET, RECORD = 'state', 'dataset', 'checksums'

# What is wrong with the machine, the network or the user's rights.
_NO_DAMAGE = re.compile(
  'PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED'
)


class Damaged(Exception):
  """A checkpoint is not what was written; says why in a few words."""


def load_state(workdir, state):
  """Reads the newest checkpoint that is whole, in all processes together.

  Args:
    workdir: of the run, an `epath.Path`.
    state: a tree that gives shapes, dtypes and placement.

  Returns:
    (step, (state, position in the data)), or None if there is no checkpoint; and {step: why} of
    the damaged ones that are newer.

  Raises:
    ConfigError: there are checkpoints, but none is whole, or they are of another model.
  """
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
  )

  def read(folder):
    record = read_record(folder)
    _check_same_model(folder, record, checksums.names(abstract), whole=True)
    arguments = {
      STATE: ocp.args.StandardRestore(abstract),
      DATASET: ocp.args.JsonRestore(),
    }
    return record, _restore(folder, arguments)

  def read_and_verify(step):
    folder = workdir / FOLDER / str(step)
    record, restored = _together(lambda: read(folder))
    sums = checksums.of_tree(restored[STATE]) if record else None
    _together(lambda: _verify(folder, record, sums, restored[DATASET]))
    return restored[STATE], restored[DATASET]

  return _newest_whole(workdir, read_and_verify)


def load_params(workdir, name, params, step=None):
  """Reads nothing but the parameters of a checkpoint, to this process's first device.

  All processes call, and each reads for itself. Nothing is moved or written: training may be under
  way.

  Args:
    workdir: of the run, an `epath.Path`.
    name: the field of the training state: 'params' or 'average'.
    params: a tree that gives shapes and dtypes.
    step: which checkpoint; None takes the newest that is whole, and names those passed over.

  Returns:
    The parameters and their step.

  Raises:
    ConfigError: there is no such checkpoint, it is damaged, or it is of another model.
  """
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = {
    name: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), params)
  }

  def read(step):
    folder = workdir / FOLDER / str(step)
    record = read_record(folder)
    _check_same_model(folder, record, checksums.names(target))
    arguments = ocp.args.PyTreeRestore(
      item=target,
      restore_args=ocp.checkpoint_utils.construct_restore_args(target),
      partial_restore=True,
    )
    restored = _restore(folder, {STATE: arguments})[STATE]
    _verify(folder, record, checksums.of_tree(restored) if record else None)
    return restored[name]

  if step is not None:
    return _read_step(workdir, step, read), step
  found, _ = _newest_whole(workdir, lambda step: _together(lambda: read(step)))
  if not found:
    raise errors.ConfigError(f'{workdir} has no checkpoint yet; train it first')
  return found[1], found[0]


def _read_step(workdir, step, read):
  """What read(step) gives, in all processes; anything amiss is a `ConfigError`."""
  known = agreement.gather(steps(workdir))[0]
  if step not in known:
    raise errors.ConfigError(
      f'{workdir} no longer has the checkpoint of step {step}, from which a student learned (it has'
      f' {", ".join(map(str, known)) or "none"}); raise its config.train.keep_checkpoints next time'
    )
  try:
    return _together(lambda: read(step))
  except Damaged as error:
    raise errors.ConfigError(
      f'the checkpoint of step {step} in {workdir} is damaged ({error}); restore it from a copy'
    ) from error


def _newest_whole(workdir, read):
  """Reads checkpoints, the newest first, until one is whole.

  Args:
    workdir: of the run.
    read: read(step) -> what was read; raises `Damaged`, or not, in all processes.

  Returns:
    (step, what was read), or None if there is no checkpoint; {step: why} of those passed over.
  """
  damaged: dict[int, str] = {}
  while True:
    known = agreement.gather(steps(workdir))[0]
    # Those that a training run has removed in the meantime were no worse than others.
    damaged = {step: reason for step, reason in damaged.items() if step in known}
    left = [step for step in known if step not in damaged]
    if not left:
      break
    try:
      found = left[-1], read(left[-1])
    except Damaged as error:
      damaged[left[-1]] = str(error)
      continue
    for step, reason in damaged.items():
      terminal.say(f'The checkpoint of step {step} is damaged ({reason}): passed over.')
    return found, damaged
  if damaged:
    reasons = '; '.join(f'step {step}: {reason}' for step, reason in damaged.items())
    raise errors.ConfigError(
      f'none of the checkpoints in {workdir / FOLDER} is whole ({reasons}); put a copy there, or'
      ' move that folder away to begin anew'
    )
  return None, {}


def alone(action):
  """action(), with whatever it raises turned into `Damaged` or `ConfigError`."""
  try:
    return action()
  except (Damaged, errors.ConfigError):
    raise
  except Exception as error:
    if isinstance(error, PermissionError | MemoryError) or _NO_DAMAGE.search(str(_root(error))):
      raise errors.ConfigError(f'cannot read a checkpoint: {why(error)}') from error
    raise Damaged(why(error)) from error


def _together(action):
  """The same in all processes: if one of them fails, all raise what that one does."""
  result = damage = other = None
  try:
    result = alone(action)
  except Damaged as error:
    damage = str(error)
  except errors.ConfigError as error:
    other = str(error)
  damage, other = agreement.first(damage), agreement.first(other)
  if other:
    raise errors.ConfigError(other)
  if damage:
    raise Damaged(damage)
  return result


def _restore(folder, arguments):
  """What Orbax reads, in this process alone: there is no barrier at which others could wait for one
  that has failed."""
  for name in arguments:
    if not (folder / name).exists():
      raise Damaged(f'it has no {name}')
  process = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=process, active_processes={process}, barrier_sync_key_prefix=f'alone{process}'
  )
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
    return reader.restore(folder, args=ocp.args.Composite(**arguments))


def read_record(folder):
  """The record of a checkpoint's checksums; None if it was written without one.

  Raises:
    Damaged: there should be one, or it is not what was written.
  """
  if not any(folder.iterdir()):
    raise Damaged('it is empty')
  items = json.loads((folder / '_CHECKPOINT_METADATA').read_text())['item_handlers']
  if RECORD not in items and not (folder / RECORD).exists():
    return None
  record = _restore(folder, {RECORD: ocp.args.JsonRestore()})[RECORD]
  digest = record.pop('digest', None)
  if digest != checksums.of_json(record):
    raise Damaged('the checksums themselves have changed')
  return record


def _check_same_model(folder, record, target, whole=False):
  """Raises ConfigError if a checkpoint does not have the leaves of `target`, {path: array}; if
  `whole`, neither more of them."""
  if record is None:
    return
  saved = {name: described[:2] for name, described in record['leaves'].items()}
  wanted = {name: checksums.described(leaf) for name, leaf in target.items()}
  for name in wanted | saved if whole else wanted:
    if saved.get(name) != wanted.get(name):
      raise errors.ConfigError(
        f'the checkpoint {folder} is of another model: {name} is {saved.get(name)} there and'
        f' {wanted.get(name)} here'
      )


def _verify(folder, record, sums, position=None):
  """Raises `Damaged` if what was read, {path: [.., .., checksum]}, is not what was written."""
  if record is None:
    terminal.say(f'The checkpoint {folder} was written without checksums: it cannot be verified.')
    return
  changed = [name for name, found in sums.items() if record['leaves'][name] != found]
  if changed:
    more = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    raise Damaged(f'{changed[0]}{more} changed on disk')
  if position is not None and record[DATASET] != checksums.of_json(position):
    raise Damaged('the position in the data changed on disk')


def steps(workdir):
  """The steps of what looks like checkpoints, the newest last."""
  return sorted(ocp.utils.checkpoint_steps(workdir / FOLDER))


def why(error):
  """An exception in a few words."""
  error = _root(error)
  text = ' '.join(str(error).split())
  if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
    return 'a file of metadata cannot be read'
  if isinstance(error, OSError) and error.strerror:
    return error.strerror + (f': {epath.Path(error.filename).name}' if error.filename else '')
  if system := re.search(r'([^:]+) \[os_error_code', text):
    return system[1].strip()
  if status := re.match('([A-Z_]+): ', text):  # TensorStore's; what follows are long paths.
    return f'an array cannot be read: {status[1].lower().replace("_", " ")}'
  return (text if len(text) <= 120 else f'{text[:117]}...') or type(error).__name__


def _root(error):
  """What an exception was raised from in the end."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error
