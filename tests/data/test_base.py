"""Splits, and what sources have in common."""

import dataclasses
import threading

import numpy as np
import pytest

from farmer_jax import config, errors
from farmer_jax.data import base

KEYS = [f'{index:03}.png' for index in range(200)]
LABELS = np.repeat([0, 1, 2], [120, 60, 20])


@dataclasses.dataclass
class Squares(base.Source):
  """An example's pixel is its index, its label the square."""

  count: int
  class_names: tuple[str, ...] = ()

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {'image': np.full((2, 2, 1), index, np.uint8), 'label': np.int32(index**2)}


def named_split(keys, labels, split, fraction=0.1):
  data = config.Data(valid_fraction=fraction)
  return {keys[index] for index in base.part(keys, labels, data, split)}


def test_parts_are_disjoint_and_complete():
  train, valid = (named_split(KEYS, LABELS, split) for split in ('train', 'valid'))
  assert not train & valid
  assert train | valid == set(KEYS)
  assert len(valid) == 20


def test_parts_are_stratified():
  valid = base.part(KEYS, LABELS, config.Data(valid_fraction=0.1), 'valid')
  np.testing.assert_array_equal(np.bincount(LABELS[valid]), [12, 6, 2])


def test_parts_do_not_depend_on_listing_order():
  shuffled = np.random.default_rng(0).permutation(len(KEYS))
  keys = [KEYS[index] for index in shuffled]
  assert named_split(keys, LABELS[shuffled], 'valid') == named_split(KEYS, LABELS, 'valid')


def test_parts_hardly_change_with_more_files():
  keys, labels = [*KEYS, 'new.png'], [*LABELS, 0]
  before, after = named_split(KEYS, LABELS, 'valid'), named_split(keys, labels, 'valid')
  assert len(before ^ after) <= 2


def test_every_prefix_is_stratified():
  order = base.stratified_order(KEYS, LABELS)
  assert sorted(order) == list(range(len(KEYS)))
  for count in (10, 50, 130):
    shares = np.bincount(LABELS[order[:count]], minlength=3)
    np.testing.assert_allclose(shares, np.array([0.6, 0.3, 0.1]) * count, atol=1)


def test_order_within_a_class_is_not_that_of_the_names():
  order = base.stratified_order(KEYS, np.zeros(len(KEYS)))
  assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3


@pytest.mark.parametrize(
  'split, fraction, advice', [('valid', 0.01, 'raise'), ('train', 0.99, 'lower')]
)
def test_empty_part(split, fraction, advice):
  with pytest.raises(errors.ConfigError, match=f'valid_fraction=.* 4 images .* {advice} it'):
    named_split(KEYS[:4], LABELS[:4], split, fraction)


def test_gather_agrees_with_single_examples():
  lazy = Squares(30)
  eager = base.in_memory(lazy, config.Data(image_size=2), 'squares')
  assert isinstance(eager, base.ArraySource)
  indices = np.array([7, 0, 29, 7])
  for source in (lazy, eager):
    batch = source.gather(indices)
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], indices)
    np.testing.assert_array_equal(batch['label'], indices**2)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].dtype == np.int32
    assert source[3]['label'].dtype == np.int32
    assert source[3]['label'] == 9
    assert source[3]['image'].shape == (2, 2, 1)


def test_large_sources_stay_lazy(monkeypatch):
  data = config.Data(image_size=2)
  monkeypatch.setattr(base, 'IN_MEMORY_BYTES', 30 * 4)
  assert isinstance(base.in_memory(Squares(29), data, 'squares'), base.ArraySource)
  source = Squares(30)
  assert base.in_memory(source, data, 'squares') is source


def test_parallel_map_keeps_order_and_uses_threads():
  barrier = threading.Barrier(3)

  def wait_for_others(item):
    barrier.wait(timeout=10)  # Breaks unless three threads are here at once.
    return 2 * item

  assert list(base.parallel_map(wait_for_others, range(300), 3, '')) == list(range(0, 600, 2))


def test_parallel_map_stops_at_an_error():
  seen = []

  def fail_at_five(item):
    seen.append(item)
    if item == 5:
      raise KeyError(item)

  with pytest.raises(KeyError):
    list(base.parallel_map(fail_at_five, range(10_000), 2, ''))
  assert len(seen) < 1000


@pytest.mark.parametrize('num_classes, count', [(0, 7), (0, 0), (7, 7)])
def test_fitting_classes(num_classes, count):
  base.check_classes(config.Data(num_classes=num_classes), count, 'X')


@pytest.mark.parametrize('num_classes, count', [(10, 7), (5, 7), (1, 0), (3, 1)])
def test_wrong_classes(num_classes, count):
  with pytest.raises(errors.ConfigError, match=f'X has .* set --config.data.num_classes={count}'):
    base.check_classes(config.Data(num_classes=num_classes), count, 'X')
