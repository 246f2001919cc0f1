"""Conversion of images to tokens and back."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft, ndimage

from farmer_jax.ops import patches


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('size, patch', [(4, 1), (6, 2), (6, 3), (4, 4)])
def test_unpatchify_undoes_patchify(size, patch, channels):
  images = np.random.default_rng(0).normal(size=(2, size, size, channels)).astype(np.float32)
  tokens = patches.patchify(jnp.asarray(images), patch)
  assert tokens.shape == (2, (size // patch) ** 2, channels * patch**2)
  np.testing.assert_array_equal(patches.unpatchify(tokens, patch, size), images)


@pytest.mark.parametrize('height, width', [(4, 6), (6, 4), (4, 4)])
def test_raster_order_of_tokens_and_pixels(height, width):
  """Written out in loops, because a transposed image would pass a round trip."""
  patch, channels = 2, 3
  images = np.arange(2 * height * width * channels).reshape(2, height, width, channels)
  tokens = np.asarray(patches.patchify(jnp.asarray(images), patch))
  for row in range(height // patch):
    for column in range(width // patch):
      expected = [
        images[:, row * patch + p, column * patch + q, c]
        for p in range(patch)
        for q in range(patch)
        for c in range(channels)
      ]
      token = row * (width // patch) + column
      np.testing.assert_array_equal(tokens[:, token], np.stack(expected, axis=-1))


@pytest.mark.parametrize('side', [1, 2, 5])
def test_neighborhoods(side):
  """Written out for the rows and columns of the predicted token. Tokens at ends of rows wrap."""
  tokens = np.random.default_rng(0).normal(size=(2, side**2, 3))
  padded = np.concatenate([np.zeros((2, side, 3)), tokens], axis=1)
  result = np.asarray(patches.neighborhoods(jnp.asarray(padded), side))
  assert result.shape == (2, side**2, 12)
  for predicted in range(1, side**2):
    row, column = divmod(predicted, side)
    places = [(row, column - 1), (row - 1, column + 1), (row - 1, column), (row - 1, column - 1)]
    index = [r * side + c for r, c in places]
    expected = [tokens[:, i] if i >= 0 else np.zeros((2, 3)) for i in index]
    np.testing.assert_allclose(result[:, predicted - 1], np.concatenate(expected, -1), rtol=1e-6)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('patch', [1, 2, 4])
def test_dct_basis_is_orthonormal_and_equals_scipy(patch, channels):
  basis = patches.dct_basis(patch, channels)
  np.testing.assert_allclose(basis @ basis.T, np.eye(channels * patch**2), atol=1e-14)
  pixels = np.random.default_rng(0).normal(size=(patch, patch, channels))
  r, g, b = np.moveaxis(pixels, -1, 0) if channels == 3 else (pixels[..., 0],) * 3
  planes = [(r + g + b) / 3**0.5, (r - b) / 2**0.5, (r - 2 * g + b) / 6**0.5]
  planes = planes if channels == 3 else [r]
  expected = np.concatenate([fft.dctn(plane, norm='ortho').ravel() for plane in planes])
  found = basis @ pixels.ravel()
  np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-12)


def test_dct_basis_has_increasing_frequencies():
  """The first channel is the mean luminance. Sign changes along a patch count the frequency."""
  basis = patches.dct_basis(4, 3).reshape(-1, 4, 4, 3)
  np.testing.assert_allclose(basis[0], 1 / 48**0.5, atol=1e-15)
  luminance = [vector for vector in basis if np.ptp(vector, axis=-1).max() < 1e-12]
  assert len(luminance) == 16
  frequencies = [
    (np.diff(np.sign(v[:, :1, 0]), axis=0) != 0).sum() + (np.diff(np.sign(v[:1, :, 0])) != 0).sum()
    for v in luminance
  ]
  assert frequencies == sorted(frequencies) and frequencies[-1] == 6


@pytest.mark.parametrize('is_reversed', [False, True], ids=['raster', 'reversed'])
@pytest.mark.parametrize('missing', [0, 1], ids=['all', 'last_missing'])
@pytest.mark.parametrize(('side', 'new_side'), [(2, 4), (4, 2), (3, 7), (4, 4), (5, 3)])
def test_positions_are_interpolated_on_the_grid(side, new_side, missing, is_reversed):
  """Compares with SciPy's interpolation in float64, between the centers of the patches."""
  positions = np.random.default_rng(0).normal(size=(2, side**2 - missing, 3))
  found = patches.resize_positions(jnp.asarray(positions, jnp.float32), side, new_side)
  order = slice(None, None, -1) if is_reversed else slice(None)
  centers = (np.arange(new_side) + 0.5) * side / new_side - 0.5
  for block in range(2):
    tokens = positions[block]
    if missing:
      corner = tokens[-1] + tokens[-side] - tokens[-side - 1]
      tokens = np.concatenate([tokens, corner[None]])
    grid = tokens[order].reshape(side, side, 3)
    expected = [
      ndimage.map_coordinates(
        grid[..., channel], np.meshgrid(centers, centers, indexing='ij'), order=1, mode='nearest'
      ).ravel()
      for channel in range(3)
    ]
    np.testing.assert_allclose(found[block], np.stack(expected, -1)[order], atol=2e-6)


def test_corner_of_a_plane_is_extrapolated():
  row, column = np.divmod(np.arange(16), 4)
  plane = jnp.stack([2.0 * row - column, row + 5.0 * column], -1)
  np.testing.assert_allclose(patches.resize_positions(plane[:-1], 4, 4), plane, atol=1e-6)
