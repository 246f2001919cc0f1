"""From encoded images of any common kind to uint8 squares of one size, by Pillow."""

import io
import warnings

import numpy as np
import PIL.ExifTags
import PIL.Image

# Formats that Pillow may try, whatever a file is called. Others stay off: EPS starts a program.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF')

_MODES = {1: 'L', 3: 'RGB'}

# Above these an image is taken for a decompression bomb. One just below takes a gigabyte to decode.
_MAX_PIXELS = 2**27
_MAX_SIDE = 2**16

# Pixels times passes over them: a progressive JPEG of a few megabytes can ask for hours of work.
_MAX_WORK = 2**32

# Pixels that are converted together where a conversion needs several copies of them.
_BAND_PIXELS = 2**22

_ORIENTATIONS = {
  2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
  3: PIL.Image.Transpose.ROTATE_180,
  4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
  5: PIL.Image.Transpose.TRANSPOSE,
  6: PIL.Image.Transpose.ROTATE_270,
  7: PIL.Image.Transpose.TRANSVERSE,
  8: PIL.Image.Transpose.ROTATE_90,
}

# They name no file, and what is wrong with an image is an exception or does not matter.
warnings.filterwarnings('ignore', module=r'PIL\.')


class BadImageError(ValueError):
  """Bytes that are no image that can be read; the message says why."""


def decode(encoded, size, channels):
  """Decodes an image, resizes its short side to `size` and crops its centre.

  The orientation in EXIF data is applied. Transparent pixels are composited over white. Of an
  animation the first frame is used. Embedded colour profiles are not applied.

  Args:
    encoded: bytes of a JPEG, PNG, WebP, BMP or GIF file.
    size: side of the result, pixels.
    channels: 1 (luminance, ITU-R 601) or 3 (RGB).

  Returns:
    uint8 [size, size, channels].

  Raises:
    BadImageError: the bytes cannot be decoded, or are a decompression bomb.
  """
  try:
    with PIL.Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
      _check_work(image, encoded)
      image.load()
      _check_work(image)  # A frame may be larger than the header said.
      return _to_array(fit(_opaque(_upright(image), _MODES[channels]), size), channels)
  except BadImageError:
    raise
  except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes.
    raise BadImageError(_reason(error)) from error


def check_header(stream):
  """Raises BadImageError unless the binary file begins like an image; pixels are not decoded."""
  try:
    with PIL.Image.open(stream, formats=_FORMATS) as image:
      _check_work(image)
  except BadImageError:
    raise
  except Exception as error:
    raise BadImageError(_reason(error)) from error


def _check_work(image, encoded=b''):
  """Raises BadImageError where decoding would take too much memory or time."""
  width, height = image.size
  if max(width, height) > _MAX_SIDE or width * height > _MAX_PIXELS:
    raise BadImageError(f'its {width} by {height} pixels look like a decompression bomb')
  if image.format in ('JPEG', 'MPO'):
    scans = encoded.count(b'\xff\xda')
    if scans * width * height > _MAX_WORK:
      raise BadImageError(f'its {scans} scans look like a decompression bomb')


def _upright(image):
  """`image`, turned as its EXIF data say; if those are damaged, as it is."""
  try:
    orientation = _ORIENTATIONS.get(image.getexif().get(PIL.ExifTags.Base.Orientation))
  except Exception:  # As with pixels, almost any type; but the pixels are whole.
    orientation = None
  return image if orientation is None else image.transpose(orientation)


def from_array(pixels, size, channels):
  """Resizes and crops decoded pixels as `decode` does.

  Args:
    pixels: uint8 [H, W] or [H, W, C] with C of 1 (grey), 3 (RGB) or 4 (RGBA).
    size: side of the result, pixels.
    channels: 1 or 3.

  Returns:
    uint8 [size, size, channels].
  """
  if pixels.dtype != np.uint8:
    raise ValueError(f'pixels must be uint8, not {pixels.dtype}')
  if pixels.ndim == 3 and pixels.shape[2] == 1:
    pixels = pixels[:, :, 0]
  image = PIL.Image.fromarray(pixels)
  return _to_array(fit(_opaque(image, _MODES[channels]), size), channels)


def from_arrays(pixels, size, channels):
  """`from_array` of a stack, uint8 [N, H, W] grey; returns uint8 [N, size, size, channels]."""
  if pixels.shape[1:] != (size, size):
    return np.stack([from_array(image, size, channels) for image in pixels])
  return np.repeat(pixels[..., None], channels, axis=3)


def fit(image, size):
  """Centre crop of `image` with its short side resized to `size`, as ADM's preprocessing does it.

  Box filters halve the image while it is at least twice too large, then one antialiased bicubic
  resize does the rest. Only the crop is resampled, not the whole image: the same pixels, and
  an image a thousand times wider than high does not become a gigabyte.
  """
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
  scale = size / min(image.size)
  left, right = _crop_range(image.width, scale, size)
  top, bottom = _crop_range(image.height, scale, size)
  return image.resize((size, size), PIL.Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def _crop_range(length, scale, size):
  """The part of a side, in source pixels, that ends up in the crop of the resized image."""
  resized = round(length * scale)
  start = (resized - size) // 2
  return start * length / resized, (start + size) * length / resized


def _opaque(image, mode):
  """`image` in `mode` ('L' or 'RGB'), eight bits a channel, over white where it is transparent."""
  if image.mode.startswith('I'):  # 16-bit grey, which `convert` would clip at 255.
    return _in_bands(image, mode, _eight_bits)
  if image.has_transparency_data:
    return _in_bands(image, mode, _over_white)
  return _convert(image, mode)


def _in_bands(image, mode, convert):
  """`convert(band, mode)` of bands of rows, put together: saves memory where it makes copies."""
  rows = max(1, _BAND_PIXELS // image.width)
  if rows >= image.height:
    return convert(image, mode)
  result = PIL.Image.new(mode, image.size)
  for top in range(0, image.height, rows):
    box = (0, top, image.width, min(top + rows, image.height))
    result.paste(convert(image.crop(box), mode), box)
  return result


def _eight_bits(image, mode):
  values = (np.asarray(image).astype(np.int32).clip(0, 65535) + 128) // 257
  return PIL.Image.fromarray(values.astype(np.uint8)).convert(mode)


def _over_white(image, mode):
  image = image.convert('RGBA')
  white = PIL.Image.new('RGBA', image.size, 'white')
  return _convert(PIL.Image.alpha_composite(white, image), mode)


def _convert(image, mode):
  if image.mode not in ('1', 'L', 'RGB'):
    image = image.convert('RGB')  # Palettes, CMYK and others know no direct way to grey.
  return image if image.mode == mode else image.convert(mode)


def _to_array(image, channels):
  """uint8 [H, W, channels] of an image in the mode of `channels`."""
  return np.array(image).reshape(image.height, image.width, channels)


def _reason(error):
  """What went wrong, in one line, without the addresses of in-memory files that Pillow shows."""
  if isinstance(error, PIL.UnidentifiedImageError):
    return 'it is not a JPEG, PNG, WebP, BMP or GIF image'
  if isinstance(error, PIL.Image.DecompressionBombError):
    return 'it looks like a decompression bomb'
  return ' '.join(str(error).split()) or type(error).__name__
