"""Conversion of images to tokens and back."""

import jax.numpy as jnp
import numpy as np
import pytest

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
