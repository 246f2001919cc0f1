"""Decoding, resizing and cropping of images in all formats."""

import io
import zlib

import numpy as np
import PIL.Image
import pytest

from farmer_jax.data import images
from tests.support.data import encode, png_of_pixel_data

SIDE = 24
LUMINANCE = [0.299, 0.587, 0.114]


@pytest.fixture
def rgb():
  """A smooth image without symmetries, uint8 [SIDE, SIDE, 3]."""
  y, x = np.mgrid[:SIDE, :SIDE]
  return np.stack([9 * x + y, 10 * y, 120 + 5 * y - 4 * x], -1).astype(np.uint8)


@pytest.mark.parametrize(
  'kind, options, tolerance',
  [('PNG', {}, 0), ('BMP', {}, 0), ('WEBP', {'lossless': True}, 0), ('JPEG', {'quality': 98}, 12)],
)
def test_rgb_formats(rgb, kind, options, tolerance):
  decoded = images.decode(encode(rgb, kind, **options), SIDE, 3)
  assert (decoded.dtype, decoded.shape) == (np.uint8, (SIDE, SIDE, 3))
  np.testing.assert_allclose(decoded.astype(int), rgb, atol=tolerance)


@pytest.mark.parametrize('kind', ['PNG', 'BMP'])
def test_gray_is_replicated(rgb, kind):
  bits = rgb[..., 0] > 100
  for pixels, values in ((rgb[..., 0], rgb[..., 0]), (bits, 255 * bits)):
    for channels in (1, 3):
      decoded = images.decode(encode(pixels, kind), SIDE, channels)
      np.testing.assert_array_equal(decoded, np.stack(channels * [values], -1))


def test_color_is_converted_to_luminance(rgb):
  decoded = images.decode(encode(rgb, 'PNG'), SIDE, 1)
  np.testing.assert_allclose(decoded[..., 0], rgb.astype(float) @ LUMINANCE, atol=1)


@pytest.mark.parametrize('mode, kind', [('RGBA', 'PNG'), ('LA', 'PNG'), ('RGBA', 'WEBP')])
def test_transparency_is_composited_over_white(rgb, mode, kind):
  alpha = (10 * np.arange(SIDE)).astype(np.uint8)[None].repeat(SIDE, 0)
  opaque = PIL.Image.fromarray(rgb).convert(mode[:-1])
  image = opaque.copy()
  image.putalpha(PIL.Image.fromarray(alpha))
  options = {'lossless': True, 'exact': True} if kind == 'WEBP' else {}
  decoded = images.decode(encode(image, kind, **options), SIDE, 3)
  opacity = alpha[..., None] / 255
  expected = np.asarray(opaque.convert('RGB')) * opacity + 255 * (1 - opacity)
  np.testing.assert_allclose(decoded, expected, atol=1.01)


def test_palette_and_transparent_colors(rgb):
  image = PIL.Image.fromarray(rgb).quantize(200)
  palette = np.array(image.convert('RGB'))
  index, color = image.getpixel((4, 3)), tuple(rgb[3, 4].tolist())
  for encoded, pixels, transparent in (
    (encode(image, 'PNG'), palette, np.zeros((SIDE, SIDE), bool)),
    (encode(image, 'PNG', transparency=index), palette, np.asarray(image) == index),
    # A PNG file can declare one color transparent, without an alpha channel.
    (encode(rgb, 'PNG', transparency=color), rgb, (rgb == color).all(-1)),
  ):
    expected = np.where(transparent[..., None], 255, pixels)
    np.testing.assert_array_equal(images.decode(encoded, SIDE, 3), expected)


def test_cmyk():
  inks = np.zeros((SIDE, SIDE, 4), np.uint8)
  inks[:, : SIDE // 2] = (40, 80, 160, 30)
  inks[:, SIDE // 2 :] = (200, 10, 90, 60)
  encoded = encode(PIL.Image.fromarray(inks, 'CMYK'), 'JPEG', quality=98)
  expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
  np.testing.assert_allclose(images.decode(encoded, SIDE, 3), expected, atol=4)
  gray = images.decode(encoded, SIDE, 1)[..., 0]
  np.testing.assert_allclose(gray, expected @ LUMINANCE, atol=4)


def test_transparent_level_of_16_bit_gray_becomes_white():
  levels = np.full((4, 4), 40000, np.uint16)
  levels[0, 0] = 777
  stream = io.BytesIO()
  PIL.Image.fromarray(levels).save(stream, 'PNG', transparency=777)
  decoded = images.decode(stream.getvalue(), 4, 1)[..., 0]
  assert decoded[0, 0] == 255 and (decoded.ravel()[1:] == 156).all()


def test_16_bits_are_scaled():
  values = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
  for channels in (1, 3):
    decoded = images.decode(encode(values, 'PNG'), SIDE, channels)
    np.testing.assert_array_equal(decoded[..., -1], np.rint(values / 257))
  values = np.linspace(0, 65535, 4 * 4 * 3).astype('>u2').reshape(4, 12)
  rows = b''.join(b'\0' + row.tobytes() for row in values)
  decoded = images.decode(png_of_pixel_data(4, 4, 16, 2, zlib.compress(rows)), 4, 3)
  np.testing.assert_allclose(decoded, values.reshape(4, 4, 3) / 257, atol=1)


@pytest.mark.parametrize('kind, tolerance', [('PNG', 0), ('JPEG', 12)])
def test_exif_orientation(rgb, kind, tolerance):
  turned = [np.rot90(rgb, -quarters) for quarters in range(4)]
  mirrored = [np.rot90(rgb[:, ::-1], -quarters) for quarters in range(4)]
  upright = turned[0], mirrored[0], turned[2], mirrored[2], mirrored[3], turned[1], mirrored[1]
  for orientation, expected in enumerate((*upright, turned[3]), start=1):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    decoded = images.decode(encode(rgb, kind, exif=exif, quality=98), SIDE, 3)
    np.testing.assert_allclose(decoded.astype(int), expected, atol=tolerance)


def box(distance):
  """Box kernel: the mean over the interval of one new pixel."""
  return (distance > -0.5) & (distance <= 0.5)


def cubic(distance):
  """Bicubic kernel with a = -1/2."""
  distance = np.abs(distance)
  near = 1.5 * distance**3 - 2.5 * distance**2 + 1
  far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
  return np.where(distance < 1, near, np.where(distance < 2, far, 0))


def resample(pixels, height, width, kernel):
  """Resamples along each axis with antialiasing. Rounds to bytes after each axis, like Pillow."""
  for size in (width, height):
    scale = pixels.shape[1] / size
    distance = np.arange(pixels.shape[1]) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale
    weights = kernel(distance / max(scale, 1))
    weights = weights / weights.sum(1, keepdims=True)
    pixels = np.floor(pixels @ weights.T + 0.5).clip(0, 255).T
  return pixels


def reference_fit(pixels, size):
  """Computes `images.fit` in the order of ADM: box filters, bicubic resizing, center crop."""
  pixels = pixels.astype(float)
  while min(pixels.shape) >= 2 * size:
    pixels = resample(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box)
  scale = size / min(pixels.shape)
  height, width = (round(side * scale) for side in pixels.shape)
  resized = resample(pixels, height, width, cubic)
  top, left = (height - size) // 2, (width - size) // 2
  return resized[top : top + size, left : left + size]


def fit(pixels, size):
  return images.decode(encode(pixels, 'PNG'), size, 1)[..., 0]


@pytest.mark.parametrize(
  'height, width, size',
  [
    *[(100, 100, 30), (64, 96, 16), (200, 130, 25), (7, 5, 16), (31, 90, 30), (256, 20, 12)],
    *[(301, 450, 64), (450, 301, 64), (129, 1000, 64)],
  ],
)
def test_fit_agrees_with_reference(height, width, size):
  pixels = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
  np.testing.assert_allclose(fit(pixels, size).astype(int), reference_fit(pixels, size), atol=1)


def test_extreme_aspect_ratio_takes_little_memory(monkeypatch):
  sizes = []
  resize = PIL.Image.Image.resize

  def recorded_resize(self, size, *args, **kwargs):
    sizes.append(size)
    return resize(self, size, *args, **kwargs)

  monkeypatch.setattr(PIL.Image.Image, 'resize', recorded_resize)
  line = np.full((1, 6000), 200, np.uint8)  # Without a crop: 256 by 1.5 million pixels.
  assert (fit(line, 256) == 200).all()
  assert sizes == [(256, 256)]


PICTURE = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
PNG = encode(PICTURE, 'PNG')
DAMAGED = {
  'truncated PNG': PNG[: len(PNG) // 2],
  'truncated JPEG': encode(PICTURE, 'JPEG')[:1500],
  'truncated WebP': encode(PICTURE, 'WEBP')[:500],
  'truncated BMP': encode(PICTURE, 'BMP')[:500],
  'PNG with a flipped byte': PNG[:6000] + bytes([PNG[6000] ^ 255]) + PNG[6001:],
  'text': b'no image',
  'empty': b'',
  'PostScript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n',
  'decompression bomb': png_of_pixel_data(50_000, 50_000, 8, 2, zlib.compress(bytes(1000))),
}


@pytest.mark.parametrize('name', DAMAGED)
def test_damaged_bytes(name):
  with pytest.raises(images.BadImageError) as caught:
    images.decode(DAMAGED[name], 8, 3)
  message = str(caught.value)
  assert message and '\n' not in message and ' at 0x' not in message
  assert ('decompression bomb' in message) == (name == 'decompression bomb')
  if name == 'PostScript':  # Pillow's decoder of PostScript is not tried.
    assert 'not a JPEG, PNG, WebP, BMP or GIF' in message


def test_check_header(rgb):
  encoded = encode(rgb, 'PNG')
  images.check_header(io.BytesIO(encoded[: len(encoded) // 2]))
  with pytest.raises(images.BadImageError):
    images.check_header(io.BytesIO(b'text'))


def test_from_arrays_replicates_and_resizes(rgb):
  stack = np.stack([rgb[..., 0], rgb[..., 1]])
  replicated = images.from_arrays(stack, SIDE, 3)
  np.testing.assert_array_equal(replicated, np.stack([stack] * 3, -1))
  halved = images.from_arrays(stack, SIDE // 2, 1)
  expected = stack.reshape(2, SIDE // 2, 2, SIDE // 2, 2).mean((2, 4))
  np.testing.assert_allclose(halved[..., 0], expected, atol=1)
