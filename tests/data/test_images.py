"""Decoding, resizing and cropping of images of every kind."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from farmer_jax.data import images

SIDE = 24


@pytest.fixture
def rgb():
  """A smooth picture without symmetries, uint8 [SIDE, SIDE, 3]."""
  y, x = np.mgrid[:SIDE, :SIDE]
  return np.stack([9 * x + y, 10 * y, 120 + 5 * y - 4 * x], -1).astype(np.uint8)


def encode(image, kind, **options):
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def png_chunks(*chunks):
  """A PNG file of the given (type, content) chunks."""
  parts = [b'\x89PNG\r\n\x1a\n']
  for name, content in chunks:
    checksum = struct.pack('>I', zlib.crc32(name + content))
    parts += [struct.pack('>I', len(content)), name, content, checksum]
  return b''.join(parts)


@pytest.mark.parametrize(
  'kind, options',
  [('PNG', {}), ('BMP', {}), ('WEBP', {'lossless': True}), ('JPEG', {'quality': 98})],
)
def test_rgb_formats(rgb, kind, options):
  decoded = images.decode(encode(PIL.Image.fromarray(rgb), kind, **options), SIDE, 3)
  assert decoded.dtype == np.uint8
  assert decoded.shape == (SIDE, SIDE, 3)
  tolerance = 12 if kind == 'JPEG' else 0
  np.testing.assert_allclose(decoded.astype(int), rgb, atol=tolerance)


@pytest.mark.parametrize('kind', ['PNG', 'BMP'])
def test_grey_is_replicated(rgb, kind):
  grey = rgb[..., 0]
  encoded = encode(PIL.Image.fromarray(grey), kind)
  np.testing.assert_array_equal(images.decode(encoded, SIDE, 1), grey[..., None])
  np.testing.assert_array_equal(images.decode(encoded, SIDE, 3), np.stack([grey] * 3, -1))


def test_colour_becomes_luminance(rgb):
  luminance = rgb.astype(float) @ [0.299, 0.587, 0.114]
  decoded = images.decode(encode(PIL.Image.fromarray(rgb), 'PNG'), SIDE, 1)
  np.testing.assert_allclose(decoded[..., 0], luminance, atol=1)


def test_one_bit(rgb):
  bits = rgb[..., 0] > 100
  encoded = encode(PIL.Image.fromarray(bits), 'PNG')
  np.testing.assert_array_equal(images.decode(encoded, SIDE, 1)[..., 0], 255 * bits)


@pytest.mark.parametrize('colours, kind', [('RGBA', 'PNG'), ('LA', 'PNG'), ('RGBA', 'WEBP')])
def test_transparency_over_white(rgb, colours, kind):
  alpha = (10 * np.arange(SIDE)).astype(np.uint8)[None].repeat(SIDE, 0)
  base = PIL.Image.fromarray(rgb).convert(colours[:-1])
  image = base.copy()
  image.putalpha(PIL.Image.fromarray(alpha))
  options = {'lossless': True, 'exact': True} if kind == 'WEBP' else {}
  decoded = images.decode(encode(image, kind, **options), SIDE, 3)
  opacity = alpha[..., None] / 255
  expected = np.asarray(base.convert('RGB')) * opacity + 255 * (1 - opacity)
  np.testing.assert_allclose(decoded, expected, atol=1.01)


def test_palette(rgb):
  image = PIL.Image.fromarray(rgb).quantize(200)
  expected = np.array(image.convert('RGB'))
  np.testing.assert_array_equal(images.decode(encode(image, 'PNG'), SIDE, 3), expected)
  hidden = np.asarray(image) == 7
  assert hidden.any()
  expected[hidden] = 255
  encoded = encode(image, 'PNG', transparency=7)
  np.testing.assert_array_equal(images.decode(encoded, SIDE, 3), expected)


def test_transparent_colour(rgb):
  """PNG can declare one colour transparent, without an alpha channel."""
  expected = rgb.copy()
  expected[3, 4] = 255
  encoded = encode(PIL.Image.fromarray(rgb), 'PNG', transparency=tuple(map(int, rgb[3, 4])))
  np.testing.assert_array_equal(images.decode(encoded, SIDE, 3), expected)


def test_cmyk():
  inks = np.zeros((SIDE, SIDE, 4), np.uint8)
  inks[:, : SIDE // 2] = (40, 80, 160, 30)
  inks[:, SIDE // 2 :] = (200, 10, 90, 60)
  encoded = encode(PIL.Image.fromarray(inks, 'CMYK'), 'JPEG', quality=98)
  expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
  decoded = images.decode(encoded, SIDE, 3)
  np.testing.assert_allclose(decoded, expected, atol=4)
  luminance = expected @ [0.299, 0.587, 0.114]
  np.testing.assert_allclose(images.decode(encoded, SIDE, 1)[..., 0], luminance, atol=4)


def test_sixteen_bit_grey_is_scaled():
  values = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
  encoded = encode(PIL.Image.fromarray(values), 'PNG')
  expected = np.rint(values / 257)
  np.testing.assert_array_equal(images.decode(encoded, SIDE, 1)[..., 0], expected)
  np.testing.assert_array_equal(images.decode(encoded, SIDE, 3)[..., 2], expected)


def test_sixteen_bit_colour_is_scaled():
  values = np.linspace(0, 65535, 4 * 4 * 3).astype('>u2').reshape(4, 12)
  rows = b''.join(b'\0' + row.tobytes() for row in values)
  header = struct.pack('>IIBBBBB', 4, 4, 16, 2, 0, 0, 0)
  encoded = png_chunks((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
  decoded = images.decode(encoded, 4, 3)
  np.testing.assert_allclose(decoded, values.reshape(4, 4, 3) / 257, atol=1)


@pytest.mark.parametrize(
  'orientation, upright',
  [
    (1, lambda a: a),
    (2, np.fliplr),
    (3, lambda a: np.rot90(a, 2)),
    (6, lambda a: np.rot90(a, -1)),
    (8, np.rot90),
  ],
)
def test_exif_orientation(rgb, orientation, upright):
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  encoded = encode(PIL.Image.fromarray(rgb), 'PNG', exif=exif)
  np.testing.assert_array_equal(images.decode(encoded, SIDE, 3), upright(rgb))
  encoded = encode(PIL.Image.fromarray(rgb), 'JPEG', exif=exif, quality=98)
  np.testing.assert_allclose(images.decode(encoded, SIDE, 3).astype(int), upright(rgb), atol=12)


def box_weights(length, size):
  """Mean over intervals of length/size pixels, by pixel centres, as a matrix [size, length]."""
  distance = np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * length / size
  half = length / size / 2
  weights = ((-half < distance) & (distance <= half)).astype(float)
  return weights / weights.sum(1, keepdims=True)


def cubic_weights(length, size):
  """Antialiased bicubic resampling (a = -1/2) along one axis, as a matrix [size, length]."""
  distance = np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * length / size
  distance = np.abs(distance / max(length / size, 1))
  near = 1.5 * distance**3 - 2.5 * distance**2 + 1
  far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
  weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
  return weights / weights.sum(1, keepdims=True)


def resample(pixels, height, width, weights):
  """Both directions by matrices, rounded to bytes after each as Pillow does."""
  for length in (width, height):
    pixels = np.floor(pixels @ weights(pixels.shape[1], length).T + 0.5).clip(0, 255).T
  return pixels


def reference_fit(pixels, size):
  """What `fit` computes: box filters by halves, bicubic resize, centre crop."""
  pixels = pixels.astype(float)
  while min(pixels.shape) >= 2 * size:
    pixels = resample(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box_weights)
  scale = size / min(pixels.shape)
  height, width = (round(side * scale) for side in pixels.shape)
  resized = resample(pixels, height, width, cubic_weights)
  top, left = (height - size) // 2, (width - size) // 2
  return resized[top : top + size, left : left + size]


@pytest.mark.parametrize(
  'height, width, size',
  [(100, 100, 30), (64, 96, 16), (200, 130, 25), (7, 5, 16), (31, 90, 30), (256, 20, 12)],
)
def test_fit_agrees_with_matrices(height, width, size):
  pixels = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
  fitted = images.from_array(pixels, size, 1)[..., 0]
  np.testing.assert_allclose(fitted, reference_fit(pixels, size), atol=1)


@pytest.mark.parametrize('shape', [(301, 450), (450, 301), (129, 1000)])
def test_fit_agrees_with_resize_then_crop(shape):
  """The usual preprocessing of ImageNet, which resizes the whole image and crops it then."""
  pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
  image, size = PIL.Image.fromarray(pixels), 64
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), PIL.Image.BOX)
  scale = size / min(image.size)
  whole = np.asarray(
    image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.BICUBIC)
  )
  top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
  expected = whole[top : top + size, left : left + size].astype(int)
  np.testing.assert_allclose(images.from_array(pixels, size, 3), expected, atol=1)


def test_no_aliasing():
  """Stripes finer than the new pixels become their mean; picking pixels would keep stripes."""
  stripes = np.zeros((330, 330), np.uint8)
  stripes[:, ::2] = 255
  inner = images.from_array(stripes, 100, 1)[5:-5, 5:-5]
  np.testing.assert_allclose(inner, 127.5, atol=6)


def test_extreme_aspect_ratio_takes_little_memory(monkeypatch):
  made = []
  resize = PIL.Image.Image.resize

  def recorded_resize(self, size, *args, **kwargs):
    made.append(size)
    return resize(self, size, *args, **kwargs)

  monkeypatch.setattr(PIL.Image.Image, 'resize', recorded_resize)
  line = np.full((1, 6000), 200, np.uint8)  # Resized as a whole: 256 by 1.5 million pixels.
  assert (images.from_array(line, 256, 1) == 200).all()
  assert made == [(256, 256)]


def test_decompression_bomb():
  header = struct.pack('>IIBBBBB', 50_000, 50_000, 8, 2, 0, 0, 0)
  encoded = png_chunks((b'IHDR', header), (b'IDAT', zlib.compress(b'\0' * 1000)), (b'IEND', b''))
  with pytest.raises(images.BadImageError, match='decompression bomb'):
    images.decode(encoded, 8, 3)


def damaged():
  """Pairs of a name and bytes that are no whole image."""
  picture = PIL.Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8))
  png, jpeg = encode(picture, 'PNG'), encode(picture, 'JPEG')
  flipped = bytearray(png)
  flipped[len(png) // 2] ^= 255
  return {
    'truncated PNG': png[: len(png) // 2],
    'truncated JPEG': jpeg[: len(jpeg) // 2],
    'truncated WebP': encode(picture, 'WEBP')[:500],
    'truncated BMP': encode(picture, 'BMP')[:500],
    'PNG with a flipped byte': bytes(flipped),
    'text': b'these are not the pixels',
    'nothing': b'',
    'PostScript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n',
  }


@pytest.mark.parametrize('name', damaged())
def test_damaged_bytes(name):
  with pytest.raises(images.BadImageError) as caught:
    images.decode(damaged()[name], 8, 3)
  message = str(caught.value)
  assert message
  assert '\n' not in message
  assert ' at 0x' not in message
  if name == 'PostScript':
    assert message == 'it is not a JPEG, PNG, WebP, BMP or GIF image'


def test_check_header(rgb):
  encoded = encode(PIL.Image.fromarray(rgb), 'PNG')
  images.check_header(io.BytesIO(encoded[: len(encoded) // 2]))
  with pytest.raises(images.BadImageError):
    images.check_header(io.BytesIO(b'text'))


def test_from_arrays_replicates_and_resizes(rgb):
  stack = np.stack([rgb[..., 0], rgb[..., 1]])
  same = images.from_arrays(stack, SIDE, 3)
  np.testing.assert_array_equal(same, np.stack([stack] * 3, -1))
  halved = images.from_arrays(stack, SIDE // 2, 1)
  expected = stack.reshape(2, SIDE // 2, 2, SIDE // 2, 2).mean((2, 4))
  np.testing.assert_allclose(halved[..., 0], expected, atol=1)


def test_from_array_takes_bytes_alone():
  with pytest.raises(ValueError, match='uint8'):
    images.from_array(np.zeros((4, 4)), 4, 1)
