"""Batches for training and evaluation."""

import functools
import json
import multiprocessing

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from farmer_jax import config, errors
from farmer_jax.data import base, pipeline
from tests.support import data as data_lib
from tests.support.data import IndexSource, train_iterator, values


def make_source(count, lazy=False):
  source = IndexSource(count)
  return source if lazy else base.cache_in_memory(source, config.Data(image_size=2), '')


lazy_or_not = pytest.mark.parametrize('lazy', [False, True])


@pytest.mark.parametrize('count, batch_size, batches', [(10, 4, 15), (3, 8, 3)])
@lazy_or_not
def test_epochs_are_different_permutations(lazy, count, batch_size, batches):
  """This also holds if a batch contains parts of two epochs, or several epochs."""
  epochs = values(train_iterator(make_source(count, lazy), batch_size), batches).reshape(-1, count)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(count), (len(epochs), 1)))
  if count == 10:
    assert len(np.unique(epochs, axis=0)) == len(epochs) == 6
    assert not (epochs == np.arange(10)).all(1).any()


def test_order_depends_only_on_the_seed():
  source = make_source(50)
  first = values(train_iterator(source, prefetch=5), 30)
  lazy = make_source(50, lazy=True)
  for other in (train_iterator(source, threads=1, prefetch=1), train_iterator(lazy, threads=4)):
    np.testing.assert_array_equal(first, values(other, 30))
  next_seed = values(train_iterator(source, seed=4), 30)
  assert (first != next_seed).any()
  assert (first[50:100] != next_seed[:50]).any()  # The next seed is not the next epoch.
  for seed in (-1, 2**40):
    values(train_iterator(source, seed=seed), 1)


@lazy_or_not
def test_processes_share_each_batch(lazy):
  source = make_source(10, lazy)
  single = train_iterator(source, 6)
  shares = [train_iterator(source, 6, share=(p, 3)) for p in range(3)]
  for _ in range(7):
    batch, *parts = map(next, (single, *shares))
    assert [part['image'].shape for part in parts] == 3 * [(2, 2, 2, 1)]
    assert (batch['image'].dtype, batch['label'].dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(batch['image'][:, 1, 1, 0], batch['label'])
    for name in batch:
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])


@lazy_or_not
def test_resume_is_exact(lazy):
  source = make_source(11, lazy)
  iterator = train_iterator(source)
  values(iterator, 5)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = values(iterator, 9)
  started = train_iterator(source)
  values(started, 3)
  for other in (iterator, train_iterator(source, threads=1, prefetch=1), started):
    other.set_state(state)
    other.start_prefetch()
    np.testing.assert_array_equal(values(other, 9), expected)
    assert other.get_state()['batches'] == 14


@pytest.mark.parametrize('change', [{'seed': 1}, {'batch_size': 5}, {'source': make_source(12)}])
def test_state_of_other_data_is_refused(change):
  arguments = {'source': make_source(11), 'batch_size': 4, 'seed': 0}
  state = train_iterator(**arguments).get_state()
  with pytest.raises(errors.ConfigError, match=next(iter(change)).replace('source', 'examples')):
    train_iterator(**{**arguments, **change}).set_state(state)


def test_state_without_fault_counts_loads():
  """The first versions of this package wrote such states."""
  first = train_iterator(make_source(24))
  values(first, 5)
  names = ('batches', 'examples', 'batch_size', 'seed')
  iterator = train_iterator(make_source(24))
  iterator.change_order()
  iterator.set_state({name: first.get_state()[name] for name in names})
  np.testing.assert_array_equal(values(iterator), values(first))


def test_orbax_checkpoint(tmp_path):
  source = make_source(11)
  iterator = train_iterator(source)
  values(iterator, 5)
  saved = ocp.args.Composite(dataset=grain.checkpoint.CheckpointSave(iterator))
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    manager.save(1, args=saved)
  expected = values(iterator, 6)
  fresh = train_iterator(source)
  wanted = ocp.args.Composite(dataset=grain.checkpoint.CheckpointRestore(fresh))
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    assert manager.restore(1, args=wanted)['dataset'] is fresh
  np.testing.assert_array_equal(values(fresh, 6), expected)


def test_every_change_of_order_gives_another_order_which_is_resumed():
  """This also holds after `set_state` has restored a state with order 0."""
  source = make_source(24)
  iterator = train_iterator(source)
  values(iterator, 6)
  state = iterator.get_state()
  orders, later = [], []
  for expected in range(4):
    iterator.set_state(state)
    if expected:
      iterator.change_order()
    assert iterator.order == expected
    orders.append(tuple(values(iterator, 6)))
    later.append((json.loads(json.dumps(iterator.get_state())), values(iterator)))
    np.testing.assert_array_equal(np.sort(orders[-1]), np.arange(24))
  assert len(set(orders)) == 4
  for order, (saved, following) in enumerate(later):
    fresh = train_iterator(source)
    fresh.set_state(saved)
    assert fresh.order == order
    np.testing.assert_array_equal(values(fresh), following)


def test_worker_process_reads_the_same_batches(monkeypatch):
  # A worker process must not initialize the devices of JAX, which the main process may own.
  monkeypatch.setenv('JAX_PLATFORMS', 'none')
  data_lib.parse_flags()
  source = make_source(20, lazy=True)
  threads, workers = train_iterator(source), train_iterator(source, workers=1)
  np.testing.assert_array_equal(values(workers, 7), values(threads, 7))
  resumed = train_iterator(source)
  resumed.set_state(workers.get_state())
  np.testing.assert_array_equal(values(resumed, 4), values(threads, 4))
  workers.close()
  assert not multiprocessing.active_children()


def test_sources_in_memory_start_no_workers(monkeypatch):
  monkeypatch.setattr(grain.IterDataset, 'mp_prefetch', lambda *args: pytest.fail('started'))
  assert len(values(train_iterator(make_source(20), workers=2), 2)) == 8


def test_closed_iterator():
  iterator = train_iterator(make_source(5))
  next(iterator)
  iterator.close()
  iterator.close()
  with pytest.raises(ValueError, match='closed'):
    next(iterator)


@pytest.mark.parametrize('batch_size, process_count', [(0, 1), (-4, 1), (6, 4)])
def test_batch_that_cannot_be_divided(batch_size, process_count):
  with pytest.raises(errors.ConfigError, match=r'train\.batch_size'):
    train_iterator(make_source(5), batch_size, share=(0, process_count))
  with pytest.raises(errors.ConfigError, match=r'train\.valid_batch_size'):
    next(pipeline.evaluation_batches(make_source(5), batch_size, process_count=process_count))


@lazy_or_not
@pytest.mark.parametrize(
  'count, limit, batches', [(10, None, 3), (8, None, 2), (10, 5, 2), (3, 9, 1), (5, 0, 0)]
)
def test_evaluation_covers_every_example_once(lazy, count, limit, batches):
  found = list(pipeline.evaluation_batches(make_source(count, lazy), 4, limit))
  assert len(found) == batches
  for batch in found:
    types = [(name, array.dtype, array.shape) for name, array in batch.items()]
    assert types == [
      *[('image', np.uint8, (4, 2, 2, 1)), ('label', np.int32, (4,))],
      *[('index', np.int32, (4,)), ('mask', bool, (4,))],
    ]
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
    np.testing.assert_array_equal(batch['index'], batch['label'])
  seen = [label for batch in found for label in batch['label'][batch['mask']]]
  assert seen == list(range(count if limit is None else min(count, limit)))


def test_processes_share_evaluation_batches():
  batches = functools.partial(pipeline.evaluation_batches, make_source(9), 8)
  shares = [batches(process_index=p, process_count=2) for p in range(2)]
  together = list(zip(batches(), *shares, strict=True))
  assert len(together) == 2
  for single, first, second in together:
    for name in ('image', 'label', 'mask', 'index'):
      np.testing.assert_array_equal(single[name], np.concatenate([first[name], second[name]]))
