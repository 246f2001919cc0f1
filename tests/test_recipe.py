"""The search for training settings, and the dataset of photo crops."""

import pathlib

import numpy as np
from PIL import Image

from benchmarks import photo_crops, recipe
from farmer_jax import config as config_lib


def test_variants_change_their_keys_only():
  changed = set()  # A variant can be the default of a dataset, but not of all datasets.
  for data in ('digits', 'fashion_mnist', 'photos'):
    search = recipe.Search(data, 'data', pathlib.Path())
    default = search.configuration('default', 100, seed=1)
    assert default.train.steps == 100 and default.seed == 1 and default.data.path == 'data'
    for name, keys in recipe.VARIANTS.items():
      variant = search.configuration(name, 100, seed=1)
      different = {
        path
        for path, _ in config_lib.leaves()
        if config_lib.get(variant, path) != config_lib.get(default, path)
      }
      assert different <= set(keys), name
      changed |= {name} if different else set()
  assert changed == set(recipe.VARIANTS) - {'default'}


def test_halving_keeps_the_best_variants(monkeypatch):
  """The result of variant k is k, and b is the best only in the last round."""
  calls = []

  def bits_per_dim(self, variant, steps, seed):
    calls.append((variant, steps, seed))
    return {'a': 1.0, 'b': 2.0 if steps < 400 else 0.5, 'c': 3.0, 'd': float('inf')}[variant]

  monkeypatch.setattr(recipe.Search, 'bits_per_dim', bits_per_dim)
  search = recipe.Search('digits', None, pathlib.Path())
  rows = search.rows(['d', 'c', 'b', 'a'], steps=400, rounds=3, finalists=2, seeds=2)
  assert [row['variant'] for row in rows] == ['b', 'a', 'c', 'd']
  assert rows[0]['400 steps, seeds: 2'] == '0.500 ± 0.000'
  assert rows[3] == {
    'variant': 'd',
    '100 steps': 'inf',
    '200 steps': '–',
    '400 steps, seeds: 2': '–',
  }
  assert [call for call in calls if call[1] == 100] == [(name, 100, 0) for name in 'dcba']
  assert len(calls) == 4 + 2 + 2 * 2


def test_crops_are_parts_of_the_photo():
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  rng = np.random.default_rng(1)
  for crop in photo_crops.crops(Image.fromarray(pixels), side=20, size=8, count=20, rng=rng):
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (8, 8, 3))
    assert (windows == crop).all((-3, -2, -1)).any()
