"""Damage to checkpoints, full disks and what is kept: on a small state, without training."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from farmer_jax import config, errors
from farmer_jax.checkpoints import checkpointer, checksums, restore

STEPS = (2, 4, 6)


class Stream:
  """Counts batches, as the training data do."""

  def __init__(self, position=0):
    self.position = position

  def get_state(self):
    return {'batches': self.position, 'examples': 1617, 'batch_size': 16, 'seed': 0}

  def set_state(self, state):
    self.position = state['batches']


def state(step):
  """One of each kind of array, as a training state nests them."""
  keys = jax.random.split(jax.random.key(step), 3)
  return {
    'step': jnp.int32(step),
    'params': {
      'kernel': jax.random.normal(keys[0], (48, 40)),
      'scale': jax.random.normal(keys[1], (17,), jnp.bfloat16),
    },
    'opt_state': (jax.random.bits(keys[2], (3, 5), jnp.uint32), {'count': jnp.int32(step)}),
  }


def save(workdir, steps=STEPS, losses=(), keep=9, **settings):
  """Goes on from what there is, if anything, and saves at each of some steps."""
  checkpoints = open_(workdir, keep, **settings)
  checkpoints.resume(state(0), Stream())
  losses = dict(losses)
  for step in steps:
    checkpoints.save(step, state(step), Stream(step), losses.get(step))
  checkpoints.close()


def open_(workdir, keep=9, **settings):
  return checkpointer.Checkpointer(
    epath.Path(workdir), config.Train(keep_checkpoints=keep, **settings)
  )


def resume(workdir):
  stream = Stream()
  restored, step = open_(workdir).resume(jax.tree.map(jnp.zeros_like, state(0)), stream)
  return restored, step, stream.position


def assert_whole(found, step):
  """What `resume` gave is the very state of `step`."""
  restored, found_step, position = found
  assert (found_step, position) == (step, step)
  jax.tree.map(np.testing.assert_array_equal, restored, state(step))


@pytest.fixture(scope='module', name='saved')
def _saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('saved') / 'run'
  save(workdir)
  return workdir


@pytest.fixture(name='run')
def _run(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'run')
  return tmp_path / 'run'


def files(run, step, pattern='**/*'):
  return sorted(p for p in (run / 'checkpoints' / str(step)).glob(pattern) if p.is_file())


def largest(run, step):
  return max(files(run, step, 'state/ocdbt.process_0/d/*'), key=lambda p: p.stat().st_size)


def flip(path, place=0.5):
  data = bytearray(path.read_bytes())
  data[int(place * len(data))] ^= 4
  path.write_bytes(data)


def truncate(run, step):
  path = largest(run, step)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(run, step):
  shutil.rmtree(run / 'checkpoints' / str(step))
  (run / 'checkpoints' / str(step)).mkdir()


def change_record(run, step):
  """Another validation loss."""
  path = run / 'checkpoints' / str(step) / 'checksums' / 'metadata'
  record = json.loads(path.read_text())
  record['loss'] = 0.5
  path.write_text(json.dumps(record))


def move_position(run, step):
  path = run / 'checkpoints' / str(step) / 'dataset' / 'metadata'
  path.write_text(path.read_text().replace(f'"batches": {step}', f'"batches": {step + 1}'))


DAMAGES = {
  'a truncated file': truncate,
  'a missing file': lambda run, step: largest(run, step).unlink(),
  'an empty step': empty,
  'a step without its state': lambda run, step: shutil.rmtree(
    run / 'checkpoints' / str(step) / 'state'
  ),
  'a step without its data position': lambda run, step: shutil.rmtree(
    run / 'checkpoints' / str(step) / 'dataset'
  ),
  'a step without its checksums': lambda run, step: shutil.rmtree(
    run / 'checkpoints' / str(step) / 'checksums'
  ),
  'a flipped bit in an array': lambda run, step: flip(largest(run, step)),
  'a flipped bit in the metadata of Orbax': lambda run, step: flip(
    run / 'checkpoints' / str(step) / 'state' / '_METADATA', 0
  ),
  'a flipped bit in the list of items': lambda run, step: flip(
    run / 'checkpoints' / str(step) / '_CHECKPOINT_METADATA', 0
  ),
  'another data position': move_position,
  'another validation loss': change_record,
}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_the_newest_whole_checkpoint_is_used_and_damage_set_aside(run, capfd, damage):
  damage(run, 6)
  before = {p.relative_to(run / 'checkpoints/6'): p.read_bytes() for p in files(run, 6)}
  assert_whole(resume(run), 4)
  said = capfd.readouterr().err
  assert re.search(r'The checkpoint of step 6 is damaged \(.{5,130}\): passed over', said), said
  aside = run / 'checkpoints_damaged' / '6'
  assert f'The damaged checkpoint of step 6 is now {aside}' in said
  assert {p.relative_to(aside): p.read_bytes() for p in aside.rglob('*') if p.is_file()} == before
  save(run, [6])
  assert_whole(resume(run), 6)
  assert 'damaged' not in capfd.readouterr().err


def test_damage_is_numbered_and_the_second_newest_may_be_hit_too(run, capfd):
  for aside in ('6', '6.1'):
    (run / 'checkpoints_damaged' / aside).mkdir(parents=True)
  truncate(run, 6)
  empty(run, 4)
  assert_whole(resume(run), 2)
  assert 'step 4 is damaged (it is empty)' in capfd.readouterr().err
  assert sorted(p.name for p in (run / 'checkpoints_damaged').iterdir()) == ['4', '6', '6.1', '6.2']
  assert (run / 'checkpoints_damaged/6.2/state/manifest.ocdbt').exists()


def test_nothing_whole_stops_the_run_each_time(run):
  for step, damage in zip(STEPS, (truncate, empty, move_position), strict=True):
    damage(run, step)
  for _ in range(2):
    with pytest.raises(errors.ConfigError, match='none of the checkpoints in .* is whole') as error:
      resume(run)
    assert '\n' not in str(error.value) and 'step 4: it is empty' in str(error.value)
    assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == ['2', '4', '6']


def test_a_flipped_bit_anywhere_is_noticed_or_without_effect(run):
  """Every file of a checkpoint, at several places."""
  rng = np.random.default_rng(0)
  noticed = 0
  for path in files(run, 6):
    whole = path.read_bytes()
    for place in rng.random(3):
      flip(path, place)
      found = resume(run)
      if found[1] == 6:
        assert_whole(found, 6)
      else:
        assert_whole(found, 4)
        noticed += 1
        shutil.move(run / 'checkpoints_damaged' / '6', run / 'checkpoints' / '6')
      path.write_bytes(whole)
  assert noticed > 10


def test_an_unfinished_checkpoint_is_named_and_removed(run, capfd):
  shutil.copytree(run / 'checkpoints/6/state', run / 'checkpoints/7.orbax-checkpoint-tmp/state')
  assert_whole(resume(run), 6)
  assert 'The checkpoint of step 7 was never finished: removed' in capfd.readouterr().err
  assert kept(run) == [2, 4, 6]


def test_old_damage_does_not_hinder_new_checkpoints(run):
  empty(run, 2)
  path = run / 'checkpoints/4/_CHECKPOINT_METADATA'
  metadata = json.loads(path.read_text()) | {'commit_timestamp_nsecs': 'soon'}
  path.write_text(json.dumps(metadata))
  save(run, [8], {8: 1.0}, keep=2, keep_best=1)
  assert_whole(resume(run), 8)
  assert kept(run) == [6, 8]


def test_checkpoints_without_checksums_are_accepted(run, capfd):
  """As they were written before there were any."""
  with ocp.CheckpointManager(run / 'checkpoints') as manager:
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state(8)), dataset=ocp.args.JsonSave(Stream(8).get_state())
    )
    manager.save(8, args=args)
  assert_whole(resume(run), 8)
  assert capfd.readouterr().err.count('written without checksums: it cannot be verified') == 1


def test_another_model_is_a_mistake_and_no_damage(run):
  other = state(0)
  other['params']['kernel'] = jnp.zeros((48, 41))
  with pytest.raises(errors.ConfigError, match=r'of another model: params/kernel is \[\[48, 40\]'):
    open_(run).resume(other, Stream())
  other = state(0)
  del other['params']['scale']
  with pytest.raises(errors.ConfigError, match=r'of another model: params/scale'):
    open_(run).resume(other, Stream())
  assert not (run / 'checkpoints_damaged').exists()


def test_going_back_within_a_run(tmp_path):
  """While a checkpoint is being written, which turns out damaged; then it is written again."""
  checkpoints = open_(tmp_path)
  for step in (2, 4):
    checkpoints.save(step, state(step), Stream(step))
  checkpoints.wait()
  truncate(tmp_path, 4)
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state(0)
  )
  stream = Stream(5)
  restored, step = checkpoints.resume(shapes, stream)
  assert_whole((restored, step, stream.position), 2)
  checkpoints.save(4, state(4), Stream(4))
  assert_whole((*checkpoints.resume(shapes, stream), stream.position), 4)
  checkpoints.close()


def load(run, step=None):
  shapes = jax.eval_shape(lambda: state(0)['params'])
  return restore.load_params(epath.Path(run), 'params', shapes, step)


def test_readers_pass_over_damage_and_move_nothing(run, capfd):
  flip(largest(run, 6))
  params, step = load(run)
  assert step == 4
  jax.tree.map(np.testing.assert_array_equal, params, state(4)['params'])
  assert 'step 6 is damaged' in capfd.readouterr().err
  assert (run / 'checkpoints/6').exists() and not (run / 'checkpoints_damaged').exists()
  with pytest.raises(
    errors.ConfigError, match=r'checkpoint of step 6 in .* is damaged \('
  ) as error:
    load(run, 6)
  assert '\n' not in str(error.value)
  with pytest.raises(errors.ConfigError, match='no longer has the checkpoint of step 5'):
    load(run, 5)
  assert load(run, 2)[1] == 2
  with pytest.raises(errors.ConfigError, match='has no checkpoint yet'):
    load(run / 'none')


@contextlib.contextmanager
def largest_file(size):
  """No file that this process writes may grow beyond `size` bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_is_said_and_tried_again(run, capfd):
  checkpoints = open_(run, keep=2)
  with largest_file(1000):
    checkpoints.save(8, state(8), Stream(8))
    checkpoints.save(10, state(10), Stream(10))
    checkpoints.wait()
  said = capfd.readouterr().err
  for step in (8, 10):
    assert f'WARNING: the checkpoint of step {step} could not be written' in said
  assert 'the newest is that of step 6. Older' in said
  assert sorted(p.name for p in (run / 'checkpoints').glob('*[0-9]')) == ['2', '4', '6']
  assert_whole(resume(run), 6)
  checkpoints.save(12, state(12), Stream(12))
  checkpoints.close()
  assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == ['12', '6']
  assert_whole(resume(run), 12)


def test_a_last_save_that_fails_ends_in_an_error(run):
  checkpoints = open_(run)
  with largest_file(1000):
    checkpoints.save(8, state(8), Stream(8))
    with pytest.raises(
      errors.ConfigError, match='step 8 could not be written .* make room'
    ) as error:
      checkpoints.close()
  assert '\n' not in str(error.value)
  assert_whole(resume(run), 6)


def test_a_full_disk(tmp_path, capfd):
  """A file system of its own, which fills up and is then given room."""
  (tmp_path / 'run').mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(tmp_path / 'run')]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting needs root')
  try:
    save(tmp_path / 'run', [2])
    filler = tmp_path / 'run' / 'filler'
    with filler.open('wb', buffering=0) as file, contextlib.suppress(OSError):
      while True:
        file.write(bytes(4096))
    with pytest.raises(errors.ConfigError, match='No space left on device'):
      save(tmp_path / 'run', [4, 6])
    assert_whole(resume(tmp_path / 'run'), 2)
    filler.unlink()
    save(tmp_path / 'run', [4])
    assert_whole(resume(tmp_path / 'run'), 4)
  finally:
    subprocess.run(['umount', str(tmp_path / 'run')], check=True)
  assert 'step 4 could not be written' in capfd.readouterr().err


def kept(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())


def test_what_is_kept(tmp_path):
  """Validation runs at every fourth step; the best are those of 4 and 12; then the run goes on, and
  the best of before are known."""
  losses = {4: 1.0, 8: 3.0, 12: 2.0, 16: float('nan'), 20: 2.5}
  steps = range(2, 22, 2)
  save(tmp_path / 'latest', steps, losses, keep=2)
  assert kept(tmp_path / 'latest') == [18, 20]
  save(tmp_path / 'best', steps, losses, keep=1, keep_best=2)
  assert kept(tmp_path / 'best') == [4, 12, 20]
  save(tmp_path / 'best', [22, 24], {24: 1.5}, keep=1, keep_best=2)
  assert kept(tmp_path / 'best') == [4, 24]
  save(tmp_path / 'every', steps, losses, keep=1, keep_every=6)
  assert kept(tmp_path / 'every') == [6, 12, 18, 20]
  save(tmp_path / 'all', steps, losses, keep=1, keep_every=10, keep_best=1)
  assert kept(tmp_path / 'all') == [4, 10, 20]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int32', 'uint32', 'bool'])
def test_every_element_counts(dtype):
  """The lowest bit of each element in turn."""
  values = np.asarray(jax.random.randint(jax.random.key(0), (5, 3, 7), 0, 2), dtype)
  found = {checksums.of_tree({'a': values_})['a'][2] for values_ in changed(values)}
  assert len(found) == 1 + values.size


def test_every_element_of_64_bits_counts():
  with jax.enable_x64(True):
    for dtype in ('float64', 'int64'):
      values = np.asarray(jax.random.randint(jax.random.key(0), (5, 3), 0, 2), dtype)
      found = {checksums.of_tree({'a': values_})['a'][2] for values_ in changed(values)}
      assert len(found) == 1 + values.size


def changed(values):
  yield jnp.asarray(values)
  for index in range(values.size):
    other = values.copy()
    raw = other.reshape(-1)[index : index + 1].view(np.uint8)
    raw[0] ^= 1
    yield jnp.asarray(other)


def test_the_checksum_knows_order_and_shape():
  values = jnp.arange(12.0)
  one, other = (checksums.of_tree({'a': v})['a'] for v in (values, values[::-1]))
  assert one[2] != other[2]
  assert checksums.of_tree({'a': values.reshape(3, 4)})['a'] != one
  # Written down once: a checkpoint is to be read by later versions.
  assert one == [[12], 'float32', EXPECTED]
  assert checksums.of_tree({'a': jnp.float32(1)})['a'][0] == []
  # Opposite changes, and changes of signs, do not make up for each other.
  signs = {checksums.of_tree({'a': values.at[jnp.array(at)].multiply(-1)})['a'][2] for at in PAIRS}
  assert len(signs) == len(PAIRS)


EXPECTED = 'a4e4c5e20c30efab'
PAIRS = [(i, j) for i in range(1, 12) for j in range(i)]


@pytest.mark.skipif(jax.device_count() > 1, reason='compares with what one device gives')
def test_a_checksum_of_parts_in_another_process_is_the_same():
  """Four devices, the array split over them."""
  program = (
    'import jax, jax.numpy as jnp\n'
    'from jax.sharding import NamedSharding, PartitionSpec as P\n'
    'from farmer_jax.runtime import checksum\n'
    'mesh = jax.make_mesh((2, 2), ("a", "b"))\n'
    'x = jax.random.normal(jax.random.key(0), (8, 6, 4))\n'
    'for spec in (P(), P("a"), P(None, "b", "a"), P(("a", "b"))):\n'
    '  placed = jax.device_put(x, NamedSharding(mesh, spec))\n'
    '  print(checksums.of_tree([placed])["0"][2])\n'
  )
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  printed = subprocess.run(
    [sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=True
  ).stdout.split()
  alone = checksums.of_tree([jax.random.normal(jax.random.key(0), (8, 6, 4))])['0'][2]
  assert printed == [alone] * 4
