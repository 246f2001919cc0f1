"""Grids of images and training curves."""

import numpy as np
from etils import epath
from PIL import Image

from farmer_jax.evaluation import figures


def test_sample_grid_puts_each_image_in_its_cell():
  images = np.broadcast_to(40 * np.arange(6).reshape(2, 3, 1, 1, 1), (2, 3, 28, 28, 1))
  images = images.astype(np.uint8)
  grid = figures.sample_grid(images)
  assert grid.shape == (4 + 2 * 60, 4 + 3 * 60, 3)
  for row, column in np.ndindex(2, 3):
    cell = grid[4 + row * 60 : 60 + row * 60, 4 + column * 60 : 60 + column * 60]
    assert (cell == images[row, column, 0, 0, 0]).all()


def test_sample_grid_preserves_colors_and_adds_margin_for_names():
  images = np.zeros((1, 1, 64, 64, 3), np.uint8)
  images[..., 1] = 200
  plain, named = figures.sample_grid(images), figures.sample_grid(images, ['trouser'])
  assert (plain[4:68, 4:68] == (0, 200, 0)).all()
  margin = named.shape[1] - plain.shape[1]
  assert margin > 20
  assert (named[:, :margin] < 128).any()


def test_save_png_round_trip(tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
  figures.save_png(epath.Path(tmp_path / 'new' / 'p.png'), picture)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'new' / 'p.png')), picture)


def test_training_curves_with_the_quality_of_samples(tmp_path):
  records = [
    {'step': s, 'split': 'fidelity', 'fid_scale_0': 9.0 - s, 'precision_scale_0': 0.5}
    for s in (1, 2)
  ]
  figures.training_curves(epath.Path(tmp_path / 'curves.png'), records, 'run')
  assert Image.open(tmp_path / 'curves.png').size == (1650, 400)


def test_training_curves_without_validation_or_with_nan(tmp_path):
  train = [{'step': s, 'split': 'train', 'loss': 1.0 / s, 'log_det': 0.1} for s in (1, 2, 3)]
  path = epath.Path(tmp_path / 'curves.png')
  for records in ([], train, [*train, {'step': 4, 'split': 'train', 'loss': float('nan')}]):
    figures.training_curves(path, records, 'run')
    assert np.asarray(Image.open(path)).std() > 0
