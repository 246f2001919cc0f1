"""Images to tokens and back."""

import einops


def patchify(images, patch_size):  # [B, H, W, C]
  """Cuts images into non-overlapping patches in raster order; returns [B, N, d] with d = C·p²."""
  return einops.rearrange(images, 'b (h p) (w q) c -> b (h w) (p q c)', p=patch_size, q=patch_size)


def unpatchify(tokens, patch_size, image_size):  # [B, N, d]
  """Undoes `patchify` for square images; returns [B, H, W, C]."""
  side = image_size // patch_size
  return einops.rearrange(
    tokens, 'b (h w) (p q c) -> b (h p) (w q) c', h=side, w=side, p=patch_size, q=patch_size
  )
