"""Batches for training and validation."""

import dataclasses
import functools
import json
import multiprocessing
import sys

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags

from farmer_jax import config, errors
from farmer_jax.data import base, pipeline


@dataclasses.dataclass
class Numbers(base.Source):
  """Examples made when they are read; every pixel, and the label, is the example's index."""

  count: int
  class_names: tuple[str, ...] = ()

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {'image': np.full((2, 2, 1), index, np.uint8), 'label': np.int32(index)}


def numbers(count, lazy=False):
  data = config.Data(image_size=2)
  return Numbers(count) if lazy else base.in_memory(Numbers(count), data, '')


def stream(source, batch_size=4, seed=0, process_index=0, process_count=1, **changes):
  data = config.Data(**{'threads': 2, 'prefetch': 3, **changes})
  return pipeline.train_iterator(source, data, batch_size, seed, process_index, process_count)


def labels(iterator, batches):
  return np.concatenate([next(iterator)['label'] for _ in range(batches)])


@pytest.mark.parametrize('lazy', [False, True])
def test_batches(lazy):
  batch = next(stream(numbers(10, lazy)))
  assert batch['image'].shape == (4, 2, 2, 1)
  assert (batch['image'].dtype, batch['label'].dtype) == (np.uint8, np.int32)
  np.testing.assert_array_equal(batch['image'][:, 1, 1, 0], batch['label'])


@pytest.mark.parametrize('lazy', [False, True])
def test_epochs_are_different_permutations(lazy):
  """Also where batches straddle epochs, as 10 examples in batches of 4 do."""
  epochs = labels(stream(numbers(10, lazy)), 15).reshape(6, 10)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (6, 1)))
  assert len(np.unique(epochs, axis=0)) == 6
  assert not (epochs == np.arange(10)).all(1).any()


def test_batch_larger_than_the_source():
  iterator = stream(numbers(3), 8)
  epochs = labels(iterator, 3).reshape(8, 3)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(3), (8, 1)))


def test_order_depends_on_the_seed_alone():
  source = numbers(50)
  first = labels(stream(source, threads=2, prefetch=5), 30)
  np.testing.assert_array_equal(first, labels(stream(source, threads=0, prefetch=0), 30))
  np.testing.assert_array_equal(first, labels(stream(numbers(50, lazy=True), threads=4), 30))
  assert (first != labels(stream(source, seed=1), 30)).any()
  labels(stream(source, seed=-1), 1)
  labels(stream(source, seed=2**40), 1)


def test_seeds_are_not_shifted_epochs():
  """The second epoch of one seed is not the first of the next seed."""
  source = numbers(40)
  second = labels(stream(source, seed=0), 20)[40:]
  assert (second != labels(stream(source, seed=1), 10)).any()


@pytest.mark.parametrize('lazy', [False, True])
def test_processes_divide_the_batches_of_one(lazy):
  source = numbers(10, lazy)
  alone = stream(source, 6)
  together = [stream(source, 6, process_index=p, process_count=3) for p in range(3)]
  for _ in range(7):
    parts = [next(iterator)['label'] for iterator in together]
    assert [len(part) for part in parts] == [2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(parts), next(alone)['label'])


@pytest.mark.parametrize('lazy', [False, True])
def test_resumes_exactly(lazy):
  source = numbers(11, lazy)
  iterator = stream(source)
  labels(iterator, 5)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = labels(iterator, 9)
  np.testing.assert_array_equal(labels(_at(iterator, state), 9), expected)
  fresh = stream(source, threads=1, prefetch=1)
  np.testing.assert_array_equal(labels(_at(fresh, state), 9), expected)
  started = stream(source)
  labels(started, 3)
  np.testing.assert_array_equal(labels(_at(started, state), 9), expected)
  assert started.get_state()['batches'] == 14


def _at(iterator, state):
  iterator.set_state(state)
  iterator.start_prefetch()
  return iterator


@pytest.mark.parametrize(
  'other', [{'seed': 1}, {'batch_size': 5}, {'source': numbers(12)}], ids=str
)
def test_refuses_the_state_of_other_data(other):
  values = {'source': numbers(11), 'batch_size': 4, 'seed': 0}
  state = stream(**values).get_state()
  with pytest.raises(errors.ConfigError, match='cannot resume the training data'):
    stream(**{**values, **other}).set_state(state)


def test_orbax_checkpoint(tmp_path):
  source = numbers(11)
  iterator = stream(source)
  labels(iterator, 5)
  saved = ocp.args.Composite(dataset=grain.checkpoint.CheckpointSave(iterator))
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    manager.save(1, args=saved)
  expected = labels(iterator, 6)
  fresh = stream(source)
  wanted = ocp.args.Composite(dataset=grain.checkpoint.CheckpointRestore(fresh))
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    restored = manager.restore(1, args=wanted)['dataset']
  assert restored is fresh
  np.testing.assert_array_equal(labels(fresh, 6), expected)


def test_workers_change_nothing():
  """Worker processes give the same stream, and a state from one resumes without them."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])  # Grain's workers read flags, which `absl.app.run` parses elsewhere.
  source = numbers(20, lazy=True)
  alone, iterator = stream(source), stream(source, workers=1)
  np.testing.assert_array_equal(labels(iterator, 7), labels(alone, 7))
  assert multiprocessing.active_children()
  fresh = stream(source)
  fresh.set_state(iterator.get_state())
  np.testing.assert_array_equal(labels(fresh, 4), labels(alone, 4))
  iterator.close()


def test_sources_in_memory_start_no_workers(monkeypatch):
  monkeypatch.setattr(grain.IterDataset, 'mp_prefetch', lambda *args: pytest.fail('started'))
  assert len(labels(stream(numbers(20), workers=2), 2)) == 8


def test_closed_iterator():
  iterator = stream(numbers(5))
  next(iterator)
  iterator.close()
  iterator.close()
  with pytest.raises(ValueError, match='closed'):
    next(iterator)


def test_error_in_a_source_reaches_the_training_loop():
  class Failing(Numbers):
    def __getitem__(self, index):
      raise errors.ConfigError(f'file {index} is bad')

  with pytest.raises(errors.ConfigError, match=r'file \d is bad'):
    next(stream(Failing(5)))


@pytest.mark.parametrize('batch_size, process_count', [(0, 1), (-4, 1), (6, 4)])
def test_batches_that_cannot_be_divided(batch_size, process_count):
  with pytest.raises(errors.ConfigError, match=r'train\.batch_size must be a positive multiple'):
    stream(numbers(5), batch_size, process_count=process_count)
  with pytest.raises(errors.ConfigError, match=r'train\.valid_batch_size must be a positive'):
    next(pipeline.valid_batches(numbers(5), batch_size, process_count=process_count))


@pytest.mark.parametrize('lazy', [False, True])
@pytest.mark.parametrize(
  'count, limit, batches', [(10, None, 3), (8, None, 2), (10, 5, 2), (3, 9, 1)]
)
def test_validation_covers_every_example_once(lazy, count, limit, batches):
  found = list(pipeline.valid_batches(numbers(count, lazy), 4, limit))
  assert len(found) == batches
  for batch in found:
    assert batch['image'].shape == (4, 2, 2, 1)
    assert batch['mask'].dtype == bool
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
  seen = np.concatenate([batch['label'][batch['mask']] for batch in found])
  np.testing.assert_array_equal(seen, np.arange(min(count, limit or count)))


def test_masked_sums_are_exact_without_recompiling():
  source = numbers(11)
  compiled = []

  @jax.jit
  def masked_sum(batch):
    compiled.append(1)
    return (batch['label'] * batch['mask']).sum()

  total = sum(masked_sum(batch) for batch in pipeline.valid_batches(source, 4))
  assert total == sum(range(11))
  assert len(compiled) == 1


def test_processes_divide_validation():
  source = numbers(9)
  of = functools.partial(pipeline.valid_batches, source, 8)
  parts = [list(of(process_index=p, process_count=2)) for p in range(2)]
  assert [len(part) for part in parts] == [2, 2]
  for whole, first, second in zip(of(), *parts, strict=True):
    for name in ('image', 'label', 'mask'):
      np.testing.assert_array_equal(whole[name], np.concatenate([first[name], second[name]]))


def test_no_validation_examples():
  assert not list(pipeline.valid_batches(numbers(5), 4, limit=0))
