"""Conversion of images to tokens and back."""

import einops
from jaxtyping import Array, Shaped


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
