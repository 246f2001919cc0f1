"""Decodes images in any common format into uint8 squares of one size, with Pillow.

Pillow's own helpers are not used for three steps:

* `ImageOps.exif_transpose` fails on damaged EXIF data. This module ignores damaged EXIF data.
* `ImageOps.fit` resizes and rounds differently from ADM's preprocessing, which is the standard for
  FID on ImageNet.
* Pillow's limit on the number of pixels does not bound the time that a progressive JPEG takes.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms

Pixels = UInt8[np.ndarray, 'size size channels']
_Conversion = Callable[[Image.Image, str], Image.Image]

# Formats that Pillow may try. File names are not used. For EPS, Pillow would start a program.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF')

# A larger image is rejected. Decoding the largest allowed image takes about 1 GiB.
_MAX_PIXELS = 2**27
_MAX_SIDE = 2**16

# Limit on pixels times scans. A progressive JPEG of a few megabytes can take hours to decode.
_MAX_WORK = 2**32

# A conversion that needs several copies of the pixels converts this many pixels at a time.
_BAND_PIXELS = 2**22

_ORIENTATIONS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

# Pillow's warnings do not name the file. Every problem that matters raises an exception.
warnings.filterwarnings('ignore', module=r'PIL\.')


class BadImageError(ValueError):
  """The bytes are not an image that can be decoded. The message says why."""


def decode(encoded: bytes, size: int, channels: int) -> Pixels:
  """Decodes an image, resizes its short side to `size` and crops its center.

  One channel is luminance (ITU-R 601). Three channels are RGB. The EXIF orientation is applied.
  Transparent pixels are composited over white. The first frame of an animation is used. Colors are
  converted to sRGB if the file has another color profile. Damaged profiles are ignored.

  Raises:
    BadImageError: the bytes cannot be decoded, or decoding would take too much memory or time.
  """
  with _open(io.BytesIO(encoded)) as image:
    _check_work(image, encoded)
    image.load()
    _check_work(image)  # A frame can be larger than the header says.
    return _to_array(_upright(image), size, channels)


def check_header(stream: BinaryIO) -> None:
  """Raises BadImageError unless the file starts with the header of an image. Decodes no pixels."""
  with _open(stream) as image:
    _check_work(image)


@contextlib.contextmanager
def _open(stream: BinaryIO) -> Iterator[Image.Image]:
  """Opens an image. Any exception within the context becomes BadImageError."""
  try:
    with Image.open(stream, formats=_FORMATS) as image:
      yield image
  except BadImageError:
    raise
  except Exception as error:  # Pillow's decoders raise almost any type on damaged bytes.
    raise BadImageError(_reason(error)) from error


def _check_work(image: Image.Image, encoded: bytes = b'') -> None:
  """Raises BadImageError if decoding would take too much memory or time."""
  width, height = image.size
  if max(width, height) > _MAX_SIDE or width * height > _MAX_PIXELS:
    raise BadImageError(f'its {width} by {height} pixels look like a decompression bomb')
  if image.format in ('JPEG', 'MPO'):
    scans = encoded.count(b'\xff\xda')
    if scans * width * height > _MAX_WORK:
      raise BadImageError(f'its {scans} scans look like a decompression bomb')


def _upright(image: Image.Image) -> Image.Image:
  """Applies the EXIF orientation, unless the EXIF data are damaged."""
  try:
    orientation = _ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
  except Exception:  # Pillow raises almost any type. The pixels are not damaged.
    orientation = None
  return image if orientation is None else image.transpose(orientation)


def from_arrays(
  pixels: UInt8[np.ndarray, 'L H W'], size: int, channels: int
) -> UInt8[np.ndarray, 'L size size channels']:
  """Resizes and crops decoded gray images like `decode`."""
  if pixels.shape[1:] != (size, size):
    return np.stack([_to_array(Image.fromarray(p), size, channels) for p in pixels])
  return np.repeat(pixels[..., None], channels, axis=3)


def fit(image: Image.Image, size: int) -> Image.Image:
  """Resizes the short side to `size` and crops the center.

  This is the preprocessing of ADM (`center_crop_arr` in openai/guided-diffusion): a box filter
  halves the image while its short side is at least 2 * size, then antialiased bicubic
  interpolation resizes it. ADM crops after resizing. Here only the crop is interpolated, which
  gives the same pixels with less memory: an image of 1 by 1,000,000 pixels, resized as a whole,
  would take gigabytes.
  """
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  left, right = _crop_range(image.width, scale, size)
  top, bottom = _crop_range(image.height, scale, size)
  return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def _crop_range(length: int, scale: float, size: int) -> tuple[float, float]:
  """Returns the start and end of the crop along one side, in pixels before resizing."""
  resized = round(length * scale)
  start = (resized - size) // 2
  return start * length / resized, (start + size) * length / resized


def _to_array(image: Image.Image, size: int, channels: int) -> Pixels:
  """Converts to 8 bits per channel, composites over white if transparent, and applies `fit`."""
  mode = 'L' if channels == 1 else 'RGB'
  profile = image.info.get('icc_profile') or b''
  native_mode = {'L': 'L', 'LA': 'L', 'CMYK': 'CMYK'}.get(image.mode, 'RGB')
  to_srgb = _transform_to_srgb(profile, native_mode)
  decoded_mode = mode if to_srgb is None else native_mode
  if image.mode.startswith('I'):  # 16-bit gray. `Image.convert` would clip it at 255.
    image, to_srgb = _in_bands(image, mode, _eight_bits), None
  elif image.has_transparency_data:
    image = _in_bands(image, decoded_mode, _over_white)
  else:
    image = _convert(image, decoded_mode)
  image = fit(image, size)
  if to_srgb is not None:  # After `fit`, because few pixels remain.
    image = _convert(to_srgb.apply(image), mode)
  return np.array(image).reshape(size, size, channels)


@functools.lru_cache(maxsize=64)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
  """Returns the color transform of a profile, or None if it is sRGB or cannot be applied.

  Transforms can be used in several threads at the same time.
  """
  try:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if 'srgb' in (source.profile.profile_description or '').lower():
      return None
    return ImageCms.buildTransform(
      *(source, ImageCms.createProfile('sRGB'), mode, 'RGB'),
      renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
      flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
  except (OSError, ValueError, ImageCms.PyCMSError):
    return None


def _in_bands(image: Image.Image, mode: str, convert: _Conversion) -> Image.Image:
  """Returns `convert(image, mode)`, computed in bands of rows to save memory."""
  rows = max(1, _BAND_PIXELS // image.width)
  if rows >= image.height:
    return convert(image, mode)
  result = Image.new(mode, image.size)
  for top in range(0, image.height, rows):
    box = (0, top, image.width, min(top + rows, image.height))
    result.paste(convert(image.crop(box), mode), box)
  return result


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
  levels = np.asarray(image).astype(np.int32).clip(0, 65535)
  values = (levels + 128) // 257
  if isinstance(transparent := image.info.get('transparency'), int):
    values[levels == transparent] = 255
  return Image.fromarray(values.astype(np.uint8)).convert(mode)


def _over_white(image: Image.Image, mode: str) -> Image.Image:
  image = image.convert('RGBA')
  white = Image.new('RGBA', image.size, 'white')
  return _convert(Image.alpha_composite(white, image), mode)


def _convert(image: Image.Image, mode: str) -> Image.Image:
  if image.mode == mode:
    return image
  if image.mode not in ('1', 'L', 'RGB'):
    image = image.convert('RGB')  # Pillow cannot convert some modes, such as CMYK, to gray.
  return image if image.mode == mode else image.convert(mode)


def _reason(error: Exception) -> str:
  """Describes the problem in one line.

  The messages of some Pillow errors contain only the memory address of a stream.
  """
  if isinstance(error, PIL.UnidentifiedImageError):
    return 'it is not a JPEG, PNG, WebP, BMP or GIF image'
  if isinstance(error, Image.DecompressionBombError):
    return 'it looks like a decompression bomb'
  return ' '.join(str(error).split()) or type(error).__name__
