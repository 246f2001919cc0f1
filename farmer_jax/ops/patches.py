"""Conversion of images to tokens and back."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def patchify(images: Shaped[Array, 'B H W C'], patch_size: int) -> Shaped[Array, 'B N d']:
  """Splits images into square patches in raster order, with d = C·patch_size²."""
  return einops.rearrange(images, 'b (h p) (w q) c -> b (h w) (p q c)', p=patch_size, q=patch_size)


def unpatchify(
  tokens: Shaped[Array, 'B N d'], patch_size: int, image_size: int
) -> Shaped[Array, 'B H W C']:
  """Inverts `patchify` for square images."""
  side = image_size // patch_size
  return einops.rearrange(
    tokens, 'b (h w) (p q c) -> b (h p) (w q) c', h=side, w=side, p=patch_size, q=patch_size
  )


def neighborhoods(tokens: Float[Array, 'B M d'], row: int) -> Float[Array, 'B n 4*d']:
  """Returns, for each of the last n tokens, the known neighbors of the token after it.

  The tokens are in raster order, `row` is the number of tokens per row of the image, and the first
  `row` of the M = row + n tokens are those before the n tokens. The neighbors of token i
  are, in this order, the tokens i - 1 (left), i - row + 1 (above on the right), i - row
  (above), and i - row - 1 (above on the left). At the ends of a row, some of these tokens belong
  to other rows.
  """
  n = tokens.shape[1] - row
  starts = (row, min(row, 2), 1, 0)
  return jnp.concatenate([tokens[:, start : start + n] for start in starts], axis=-1)


def resize_positions(
  positions: Float[Array, '*lead n width'], side: int, new_side: int
) -> Float[Array, '*lead N width']:
  """Interpolates embeddings of positions between square grids of patches, bilinearly.

  The n = side² embeddings are in raster order, and so are the N = new_side² results. The order can
  also be reversed, because it then is the raster order of the rotated grid. If n = side² - 1, the
  last corner of the grid is extrapolated from its three neighbors. The centers of the outer patches
  of a finer grid lie outside those of the coarse grid, and take the nearest values on the border.
  """
  if positions.shape[-2] < side**2:
    left, above, diagonal = (positions[..., -i, :] for i in (1, side, side + 1))
    corner = (left + above - diagonal)[..., None, :]
    positions = jnp.concatenate([positions, corner], axis=-2)
  *lead, _, width = positions.shape
  grid = positions.reshape(*lead, side, side, width)
  resized = jax.image.resize(grid, (*lead, new_side, new_side, width), 'linear', antialias=False)
  return resized.reshape(*lead, new_side**2, width)


def dct_basis(patch_size: int, channels: int) -> Float[np.ndarray, 'd d']:
  """Returns an orthonormal basis of patches with d = channels·patch_size². Rows are basis vectors.

  A basis vector is a product of two vectors of the discrete cosine transform (DCT-II), along the
  height and the width, and for RGB a vector of luminance or of one of two color differences. The
  rows are sorted by the sum of the two frequencies, plus patch_size / 2 for a color difference. The
  columns have the order of the channels of `patchify`.

  In natural images, neighboring pixels and the colors of a pixel are strongly correlated, but the
  coefficients in this basis are not. The flow cannot remove correlations within a token.
  """
  n = np.arange(patch_size)
  cosines = np.sqrt(2 / patch_size) * np.cos(np.pi * (n + 0.5) * n[:, None] / patch_size)
  cosines[0] /= np.sqrt(2)
  colors = np.eye(channels)
  if channels == 3:
    colors = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
  basis = np.einsum('ap,bq,kc->abkpqc', cosines, cosines, colors)
  row, column, color = np.indices((patch_size, patch_size, channels))
  frequency = row + column + (patch_size / 2) * (color > 0)
  order = np.argsort(frequency.ravel(), kind='stable')
  return basis.reshape(frequency.size, -1)[order]
