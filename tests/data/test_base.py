"""Functions that all sources share."""

import threading

import numpy as np
import pytest

from farmer_jax import config, errors
from farmer_jax.data import base
from tests.support.data import IndexSource

DATA = config.Data(image_size=2)


def test_gather_agrees_with_single_examples():
  lazy = IndexSource(30)
  cached = base.cache_in_memory(lazy, DATA, '')
  assert isinstance(cached, base.ArraySource)
  indices = np.array([7, 0, 29, 7])
  for source in (lazy, cached):
    batch = source.gather(indices)
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], indices)
    np.testing.assert_array_equal(batch['label'], indices)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].dtype == source[3]['label'].dtype == np.int32
    assert source[3]['label'] == 3
    assert source[3]['image'].shape == (2, 2, 1)


def test_large_sources_are_not_cached(monkeypatch):
  monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 30 * 4)
  assert isinstance(base.cache_in_memory(IndexSource(29), DATA, ''), base.ArraySource)
  source = IndexSource(30)
  assert base.cache_in_memory(source, DATA, '') is source


def test_fingerprint_depends_on_the_images():
  cached = [base.cache_in_memory(IndexSource(n), DATA, '') for n in (30, 30, 31)]
  for sources in (cached, [IndexSource(n) for n in (200, 200, 201)]):
    first, same, other = map(base.fingerprint, sources)
    assert first == same != other


def test_parallel_map_keeps_order_uses_threads_and_shows_progress(monkeypatch, capfd):
  monkeypatch.setattr(base, '_PROGRESS_DELAY', -1)
  barrier = threading.Barrier(3)

  def double_in_three_threads(item):
    barrier.wait(timeout=10)  # Fails unless three threads wait at the same time.
    return 2 * item

  results = base.parallel_map(double_in_three_threads, range(300), 3, 'counting')
  assert list(results) == list(range(0, 600, 2))
  assert 'counting' in capfd.readouterr().err


def test_parallel_map_stops_at_an_error(capfd):
  seen = []

  def fail_at_five(item):
    seen.append(item)
    if item == 5:
      raise KeyError(item)

  with pytest.raises(KeyError):
    list(base.parallel_map(fail_at_five, range(10_000), 2, 'counting'))
  assert len(seen) < 1000
  assert not capfd.readouterr().err  # The progress bar appears after a few seconds.


def test_number_of_classes():
  for num_classes, count in ((0, 7), (0, 0), (7, 7)):
    base.check_num_classes(config.Data(num_classes=num_classes), count, 'X')
  for num_classes, count in ((10, 7), (5, 7), (1, 0), (3, 1)):
    with pytest.raises(errors.ConfigError, match=f'X .*--config.data.num_classes={count}'):
      base.check_num_classes(config.Data(num_classes=num_classes), count, 'X')


KEYS = [f'{index:03}.png' for index in range(200)]
LABELS = np.repeat([0, 1, 2], [120, 60, 20])


def split(keys, labels, name, fraction=0.1):
  return base.split_indices(keys, labels, config.Data(valid_fraction=fraction), name)


def split_keys(keys, labels):
  return {keys[index] for index in split(keys, labels, 'valid')}


def test_splits_are_disjoint_complete_and_stratified():
  train, valid = (split(KEYS, LABELS, name) for name in ('train', 'valid'))
  assert sorted([*train, *valid]) == list(range(len(KEYS)))
  np.testing.assert_array_equal(np.bincount(LABELS[valid]), [12, 6, 2])


def test_split_does_not_depend_on_listing_order_and_changes_little_with_a_new_file():
  before = split_keys(KEYS, LABELS)
  shuffled = np.random.default_rng(0).permutation(len(KEYS))
  assert split_keys([KEYS[index] for index in shuffled], LABELS[shuffled]) == before
  assert len(before ^ split_keys([*KEYS, 'new.png'], [*LABELS, 0])) <= 2


def test_every_prefix_is_stratified_and_classes_are_not_alphabetical():
  order = base.stratified_order(KEYS, LABELS)
  for count in (10, 50, 130):
    counts = np.bincount(LABELS[order[:count]], minlength=3)
    np.testing.assert_allclose(counts, np.array([0.6, 0.3, 0.1]) * count, atol=1)
  members = order[LABELS[order] == 0]
  assert abs(np.corrcoef(members, np.arange(len(members)))[0, 1]) < 0.3


@pytest.mark.parametrize('name, fraction', [('valid', 0.01), ('train', 0.99)])
def test_empty_split(name, fraction):
  with pytest.raises(errors.ConfigError, match='valid_fraction=.* 4 images'):
    split(KEYS[:4], LABELS[:4], name, fraction)
