"""Saving, restoring, refusing and deleting checkpoints of a small state, with faults."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from farmer_jax import checkpoints as checkpoints_lib
from farmer_jax import errors
from farmer_jax.distributed import mesh
from tests.support import checkpoints, filesystems
from tests.support.checkpoints import Iterator, assert_restored, change_json, list_steps, make_state

SHAPES = mesh.LocalDevices().abstract(jax.eval_shape(lambda: make_state(0)['params']))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A run with three checkpoints, which tests must not change."""
  workdir = tmp_path_factory.mktemp('saved') / 'run'
  checkpoints.save(workdir)
  return workdir


@pytest.fixture
def run(saved, workdir):
  return shutil.copytree(saved, workdir)


def restore_params(run, step=None):
  return checkpoints_lib.restore_params(epath.Path(run), 'params', SHAPES, step)


def assert_refused(match, function, *args):
  with pytest.raises(errors.CheckpointError, match=match) as error:
    function(*args)
  assert '\n' not in str(error.value)


def item(run, *parts):
  return run.joinpath('checkpoints', '6', *parts)


def read_files(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


CORRUPTIONS = {
  'flipped bit in an array': lambda run: checkpoints.flip_bit(checkpoints.largest_file(run, 6)),
  'truncated file': lambda run: checkpoints.truncate(run, 6),
  'missing file': lambda run: checkpoints.largest_file(run, 6).unlink(),
  'empty checkpoint': lambda run: checkpoints.make_empty(run, 6),
  'missing state': lambda run: shutil.rmtree(item(run, 'state')),
  'missing iterator state': lambda run: shutil.rmtree(item(run, 'data_iterator')),
  'missing manifest': lambda run: shutil.rmtree(item(run, 'manifest')),
  'flipped bit in the metadata of the state': lambda run: checkpoints.flip_bit(
    item(run, 'state', '_METADATA'), 0
  ),
  'flipped bit in the list of items': lambda run: checkpoints.flip_bit(
    item(run, '_CHECKPOINT_METADATA'), 0
  ),
  'changed iterator state': lambda run: change_json(run, 6, 'data_iterator', batches=5),
  'changed validation loss': lambda run: change_json(run, 6, 'manifest', loss=0.5),
}


@pytest.mark.parametrize('corrupt', CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupt_checkpoint_is_quarantined_and_the_previous_one_restored(run, corrupt, caplog):
  corrupt(run)
  before = read_files(item(run))
  assert_restored(checkpoints.restore(run), 4)
  warnings = ' '.join(record.message for record in caplog.records)
  quarantined = run / 'checkpoints_quarantine' / '6'
  assert 'heckpoint 6 is corrupt' in warnings and 'step 4' in warnings
  assert str(quarantined) in warnings
  assert read_files(quarantined) == before
  caplog.clear()
  checkpoints.save(run, [6])
  assert_restored(checkpoints.restore(run), 6)
  assert 'is corrupt' not in caplog.text


@pytest.mark.faults
def test_flipped_bit_anywhere_is_detected_or_has_no_effect(run):
  """The test flips a bit at three positions in every file of a checkpoint."""
  rng = np.random.default_rng(0)
  num_detected = 0
  for name, valid in read_files(item(run)).items():
    path = item(run, name)
    for position in rng.random(3):
      checkpoints.flip_bit(path, position)
      restored = checkpoints.restore(run)
      assert_restored(restored, restored[1])
      if restored[1] != 6:
        num_detected += 1
        shutil.move(run / 'checkpoints_quarantine' / '6', run / 'checkpoints' / '6')
      path.write_bytes(valid)
  assert num_detected > 10


def test_two_corrupt_checkpoints_and_one_step_that_was_quarantined_before(run, caplog):
  quarantine = run / 'checkpoints_quarantine'
  for name in ('6', '6.1'):
    (quarantine / name).mkdir(parents=True)
  checkpoints.truncate(run, 6)
  checkpoints.make_empty(run, 4)
  assert_restored(checkpoints.restore(run), 2)
  assert 'heckpoint 4 is corrupt (it is empty)' in caplog.text
  assert sorted(path.name for path in quarantine.iterdir()) == ['4', '6', '6.1', '6.2']
  assert (quarantine / '6.2/state/manifest.ocdbt').exists()


def test_no_valid_checkpoint_is_an_error_at_each_start(run):
  checkpoints.truncate(run, 2)
  checkpoints.make_empty(run, 4)
  change_json(run, 6, 'data_iterator', batches=5)
  for _ in range(2):
    assert_refused('checkpoints .*step 4: it is empty', checkpoints.restore, run)
    assert list_steps(run) == [2, 4, 6]


def test_old_corrupt_checkpoints_do_not_prevent_saves(run):
  checkpoints.make_empty(run, 2)
  path = run / 'checkpoints/4/_CHECKPOINT_METADATA'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'commit_timestamp_nsecs': 'soon'}))
  checkpoints.save(run, [8], {8: 1.0}, keep=2, keep_best=1)
  assert_restored(checkpoints.restore(run), 8)
  assert list_steps(run) == [6, 8]


def test_incomplete_checkpoint_is_deleted(run, caplog):
  caplog.set_level(logging.INFO, logger='absl')
  shutil.copytree(item(run, 'state'), run / 'checkpoints/7.orbax-checkpoint-tmp/state')
  assert_restored(checkpoints.restore(run), 6)
  assert 'incomplete checkpoint 7' in caplog.text
  assert list_steps(run) == [2, 4, 6]


def test_checkpoint_of_another_model_is_refused_and_not_quarantined(run):
  larger, smaller = make_state(0), make_state(0)
  larger['params']['kernel'] = jnp.zeros((48, 41))
  del smaller['params']['scale']
  for state, path in (larger, 'params/kernel'), (smaller, 'params/scale'):
    checkpointer = checkpoints.open_checkpointer(run)
    assert_refused(path, checkpointer.restore_latest, state, Iterator())
  assert list_steps(run) == [2, 4, 6]


@pytest.mark.parametrize('with_checksums', [True, False])
def test_checkpoint_of_an_earlier_version_is_refused(run, with_checksums):
  """Format 1 had the items state, dataset and checksums. Format 0 had no checksums."""
  iterator_state = ocp.args.JsonSave(Iterator(8).get_state())
  items = {'state': ocp.args.StandardSave(make_state(8)), 'dataset': iterator_state}
  if with_checksums:
    items['checksums'] = ocp.args.JsonSave({'format': 1})
  with ocp.CheckpointManager(run / 'checkpoints') as manager:
    manager.save(8, args=ocp.args.Composite(**items))
  for read in checkpoints.restore, restore_params:
    assert_refused('checkpoints/8 .*farmer_jax 0.1', read, run)
  assert list_steps(run) == [2, 4, 6, 8]


def test_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints_lib.restore, 'FORMAT', 4)
    checkpoints.save(tmp_path, [2])
  assert_refused('format 3', checkpoints.restore, tmp_path)


def test_restore_during_a_run(tmp_path):
  """A rollback finds the newest checkpoint corrupt. Training saves it again."""
  checkpointer = checkpoints.open_checkpointer(tmp_path)
  for step in (2, 4):
    checkpointer.save(step, make_state(step), Iterator(step))
  checkpointer.wait()
  checkpoints.truncate(tmp_path, 4)
  assert_restored(checkpoints.restore(tmp_path, checkpointer), 2)
  checkpointer.save(4, make_state(4), Iterator(4))
  assert_restored(checkpoints.restore(tmp_path, checkpointer), 4)
  checkpointer.close()


def test_restore_params_passes_over_corruption_and_moves_nothing(run, caplog):
  checkpoints.flip_bit(checkpoints.largest_file(run, 6))
  params, step = restore_params(run)
  assert step == 4
  jax.tree.map(np.testing.assert_array_equal, params, make_state(4)['params'])
  assert 'heckpoint 6 is corrupt' in caplog.text
  assert list_steps(run) == [2, 4, 6]
  assert restore_params(run, 2)[1] == 2
  for folder, step, named in (run, 6, '6'), (run, 5, 'step 5'), (run / 'none', None, 'none'):
    assert_refused(named, restore_params, folder, step)


def test_retention(tmp_path):
  """Some checkpoints have no validation loss. A resumed run knows the earlier losses."""
  losses = {2: 1.0, 6: 2.0, 8: float('nan'), 10: 2.5}
  for name, train, expected in (
    ('latest', dict(keep=2), [10, 12]),
    ('best', dict(keep=1, keep_best=2), [2, 6, 12]),
    ('all', dict(keep=1, keep_every=4, keep_best=1), [2, 4, 8, 12]),
  ):
    checkpoints.save(tmp_path / name, range(2, 14, 2), losses, **train)
    assert list_steps(tmp_path / name) == expected
  checkpoints.save(tmp_path / 'best', [14, 16], {16: 1.5}, keep=1, keep_best=2)
  assert list_steps(tmp_path / 'best') == [2, 16]


def test_retention_by_fidelity(tmp_path):
  """Both scores are saved, so that a run can resume with the other metric."""
  losses, distances = [4.0, 3.0, 2.0, 1.0], [8.0, 5.0, None, 6.0]

  def save(steps, **train):
    checkpointer = checkpoints.open_checkpointer(tmp_path, keep=1, keep_every=4, **train)
    checkpointer.restore_latest(make_state(0), Iterator())
    for step in steps:
      scores = losses[step // 2 - 1], distances[step // 2 - 1]
      checkpointer.save(step, make_state(step), Iterator(step), *scores)
    checkpointer.close()
    return list_steps(tmp_path)

  save([2], keep_best=1)
  assert save([4, 6, 8], best_metric='fidelity', keep_best=2) == [4, 8]
  assert save([4, 6], best_metric='fidelity', keep_best=1) == [4, 6, 8]


def test_failed_save_is_reported_and_the_next_save_succeeds(run, caplog):
  checkpointer = checkpoints.open_checkpointer(run, keep=2)
  with checkpoints.file_size_limit(1000):
    for step in (8, 10):
      checkpointer.save(step, make_state(step), Iterator(step))
    checkpointer.wait()
  for step in (8, 10):
    failure = f'saving checkpoint {step} failed (File too large); the newest checkpoint is 6'
    assert failure in caplog.text
  assert list_steps(run) == [2, 4, 6]
  assert_restored(checkpoints.restore(run), 6)
  checkpointer.save(12, make_state(12), Iterator(12))
  checkpointer.close()
  assert list_steps(run) == [6, 12]
  assert_restored(checkpoints.restore(run), 12)


def test_first_checkpoint_is_read_back(tmp_path, monkeypatch):
  """A disk that loses data is noticed at the first checkpoint, not at the end of the run."""
  checkpointer = checkpoints.open_checkpointer(tmp_path)
  wait = checkpointer.wait

  def wait_and_lose(*unused):
    wait()
    for file in (tmp_path / 'checkpoints' / '2' / 'state').rglob('*'):
      if file.is_file():
        file.write_bytes(b'')

  monkeypatch.setattr(checkpointer, 'wait', wait_and_lose)
  with pytest.raises(errors.CheckpointError, match='cannot be read back'):
    checkpointer.save(2, make_state(2), Iterator(2))


def test_checkpoint_with_the_name_of_another_step_is_corrupt(run, caplog):
  (run / 'checkpoints' / '6').rename(run / 'checkpoints' / '8')
  assert_restored(checkpoints.restore(run), 4)
  assert 'it is a checkpoint of step 6' in caplog.text


def test_failure_of_the_last_save_is_an_error(run):
  checkpointer = checkpoints.open_checkpointer(run)
  with checkpoints.file_size_limit(1000):
    checkpointer.save(8, make_state(8), Iterator(8))
    assert_refused(f'checkpoint 8 .*{run}', checkpointer.close)
  assert_restored(checkpoints.restore(run), 6)


@pytest.mark.faults
def test_full_disk(tmp_path, caplog):
  """The disk fills up. Later, space becomes free."""
  run = tmp_path / 'run'
  with filesystems.small_disk(run, '2m'):
    checkpoints.save(run, [2])
    filesystems.fill(run / 'filler')
    assert_refused('No space left on device', checkpoints.save, run, [4, 6])
    assert 'checkpoint 4 failed' in caplog.text
    assert_restored(checkpoints.restore(run), 2)
    (run / 'filler').unlink()
    checkpoints.save(run, [4])
    assert_restored(checkpoints.restore(run), 4)
