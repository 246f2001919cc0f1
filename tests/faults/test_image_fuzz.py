"""Decoding damaged or malicious images gives an array or BadImageError, within limits."""

import contextlib
import io
import resource
import struct
import time

import hypothesis
import numpy as np
import PIL.Image
import pytest
from hypothesis import strategies as st

from farmer_jax.data import images
from tests.support import data as data_lib
from tests.support import processes
from tests.support.fuzzing import settings

SIZE = 16

pytestmark = [
  pytest.mark.faults,
  pytest.mark.filterwarnings('ignore'),  # Pillow warns about large images.
]


def photo(height, width, channels):
  """Returns an image with edges and noise."""
  random = np.random.default_rng(height)
  y, x = np.mgrid[:height, :width]
  smooth = np.stack([5 * x + y, 3 * y, 200 - x - y, 255 - 4 * x][:channels], -1)
  return (smooth + random.integers(0, 30, (height, width, channels))).astype(np.uint8)


def encode(pixels, kind, mode=None, **options):
  return data_lib.encode(PIL.Image.fromarray(pixels).convert(mode), kind, **options)


def undamaged_files():
  rgb, rgba = photo(40, 56, 3), photo(33, 47, 4)
  exif = PIL.Image.Exif()
  exif[0x0112], exif[0x010E] = 6, 'a description'
  frames = [PIL.Image.fromarray(photo(20 + k, 30, 3)).resize((30, 24)) for k in range(3)]
  animated = {'save_all': True, 'append_images': frames[1:]}
  gray16 = (photo(20, 30, 1)[..., 0].astype(np.uint16) << 8) + 77
  files = {
    'rgb.png': encode(rgb, 'PNG'),
    'rgba.png': encode(rgba, 'PNG'),
    'palette.png': encode(rgb, 'PNG', 'P', transparency=3),
    'gray16.png': data_lib.encode(gray16, 'PNG'),
    'bits.png': encode(rgb, 'PNG', '1'),
    'exif.png': encode(rgb, 'PNG', exif=exif),
    'plain.jpg': encode(rgb, 'JPEG', exif=exif),
    'progressive.jpg': encode(rgb, 'JPEG', progressive=True, optimize=True),
    'cmyk.jpg': encode(rgb, 'JPEG', 'CMYK'),
    'lossy.webp': encode(rgb, 'WEBP', quality=50, exif=exif),
    'lossless.webp': encode(rgba, 'WEBP', lossless=True),
    'rgb.bmp': encode(rgb, 'BMP'),
    'palette.bmp': encode(rgb, 'BMP', 'P'),
    'rle.bmp': rle_bmp(30, 20, bytes([30, 7, 0, 0]) * 20 + b'\0\1'),
    'palette.gif': encode(rgb, 'GIF'),
  }
  for kind, name in (('PNG', 'apng.png'), ('WEBP', 'moving.webp'), ('GIF', 'moving.gif')):
    files[name] = data_lib.encode(frames[0], kind, **animated)
  return files


def rle_bmp(width, height, data):
  """Returns a run-length encoded BMP file of 256 grays."""
  palette = b''.join(bytes([v, v, v, 0]) for v in range(256))
  offset = 14 + 40 + len(palette)
  header = struct.pack('<IiiHHIIiiII', 40, width, height, 1, 8, 1, len(data), 2835, 2835, 256, 256)
  return struct.pack('<2sIHHI', b'BM', offset + len(data), 0, 0, offset) + header + palette + data


FILES = undamaged_files()


def with_valid_checksums(content):
  """Returns a PNG file with corrected checksums, so that damage reaches the decoder."""
  if content[:8] != b'\x89PNG\r\n\x1a\n':
    return content
  parts, at = [content[:8]], 8
  while at + 12 <= len(content):
    length = int.from_bytes(content[at : at + 4], 'big')
    parts.append(data_lib.png_chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
    at += 12 + length
  return b''.join(parts)


# Offset and `struct` format of the width and the height in each file format.
DIMENSIONS = {
  'png': [(16, '>I'), (20, '>I')],
  'bmp': [(18, '<i'), (22, '<i')],
  'gif': [(6, '<H'), (8, '<H')],
  'webp': [(24, '<H'), (26, '<H'), (27, '<H')],
}


def set_dimension(content, name, which, value):
  """Returns a file with another width or height in its header."""
  content = bytearray(content)
  places = DIMENSIONS.get(name.rpartition('.')[2])
  if places is None:  # In a JPEG file, the segment with the size has a variable offset.
    starts = [content.find(bytes([255, marker])) for marker in (0xC0, 0xC1, 0xC2)]
    places = [(start + offset, '>H') for start in starts if start > 0 for offset in (5, 7)]
  if not places:
    return bytes(content)
  offset, kind = places[which % len(places)]
  bits = 8 * struct.calcsize(kind) - (kind[-1] == 'i')
  if offset + struct.calcsize(kind) <= len(content):
    struct.pack_into(kind, content, offset, value % 2**bits)
  return bytes(content)


def with_size(name, first, second):
  return set_dimension(set_dimension(FILES[name], name, 0, first), name, 1, second)


SIZES = st.one_of(
  st.integers(0, 70),
  st.sampled_from([0, 1, 255, 4096, 2**14 - 1, 2**15, 2**16 - 1, 2**16, 2**20, 2**31 - 1]),
)


@st.composite
def damaged_files(draw):
  """Draws the name of a file and its content with one to three kinds of damage."""
  name = draw(st.sampled_from(sorted(FILES)))
  content = FILES[name]
  for _ in range(draw(st.integers(1, 3))):
    kind = draw(st.sampled_from(['flip', 'flip', 'cut', 'splice', 'size', 'insert', 'remove']))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if draw(st.booleans()):  # Half of the damage goes to the header, which is short.
      at %= 64
    before, after = content[:at], content[at:]
    if kind == 'flip':
      noise = draw(st.binary(min_size=1, max_size=4))
      content = before + noise + after[len(noise) :]
    elif kind == 'cut':
      content = before
    elif kind == 'splice':
      other = FILES[draw(st.sampled_from(sorted(FILES)))]
      content = before + other[at % len(other) :]
    elif kind == 'size':
      content = set_dimension(content, name, draw(st.integers(0, 3)), draw(SIZES))
    elif kind == 'insert':
      content = before + draw(st.binary(max_size=40)) + after
    else:
      content = before + after[draw(st.integers(1, 40)) :]
  return name, with_valid_checksums(content) if draw(st.booleans()) else content


def peak_memory():
  """Returns the peak memory of this process in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def limits(seconds, size):
  """Asserts that a block takes less time and memory, in bytes, than the limits."""
  start, memory = time.monotonic(), peak_memory()
  yield
  assert time.monotonic() - start < seconds
  assert peak_memory() - memory < size


def check(content):
  """Decodes to 1 and 3 channels within limits. Returns whether the file is an image."""
  found = []
  for channels in (1, 3):
    with limits(20, 1.5 * 2**30):
      try:
        image = images.decode(content, SIZE, channels)
      except images.BadImageError as error:
        assert str(error) and '\n' not in str(error) and ' at 0x' not in str(error)
        found.append(False)
      else:
        assert (image.dtype, image.shape) == (np.uint8, (SIZE, SIZE, channels))
        found.append(True)
  assert found[0] == found[1]
  try:
    images.check_header(io.BytesIO(content))
  except images.BadImageError:
    assert not found[0]
  return found[0]


def test_undamaged_files():
  for name, content in FILES.items():
    assert check(content), name


@pytest.mark.parametrize('examples', [800, pytest.param(60_000, marks=pytest.mark.slow)])
def test_damaged_files(examples):
  seen = []

  @settings(examples)
  @hypothesis.given(damaged_files())
  def fuzz(damaged):
    seen.append(check(damaged[1]))

  fuzz()
  assert 0.05 < np.mean(seen) < 0.95  # Some damaged files are still images.


@settings(200)
@hypothesis.given(st.binary(max_size=200))
def test_any_bytes(content):
  check(content)


def many_scans_jpeg():
  """Returns a progressive JPEG of 65,000 by 2,000 pixels with 20,000 extra scans."""
  content = with_size('progressive.jpg', 2000, 65_000)
  start = content.rfind(b'\xff\xda')
  length = int.from_bytes(content[start + 2 : start + 4], 'big')
  scan = content[start : start + 2 + length]
  return content[:-2] + 20_000 * scan + content[-2:]


def png_of_zeros(width, height, depth, color, count):
  zeros = data_lib.compressed_zeros(count)
  return data_lib.png_of_pixel_data(width, height, depth, color, zeros)


# Small files that would take much memory or time to decode.
BOMBS = {
  'PNG header of 50,000 x 50,000': png_of_zeros(50_000, 50_000, 8, 2, 1000),
  'PNG of 13,000 x 13,000': png_of_zeros(13_000, 13_000, 8, 0, 13_001 * 13_000),
  'PNG of 2**27 x 1': png_of_zeros(2**27, 1, 8, 0, 2**27 + 1),
  '1-bit PNG of 40,000 x 40,000': png_of_zeros(40_000, 40_000, 1, 0, 5001 * 40_000),
  'BMP of 2**27 x 1': rle_bmp(2**27, 1, b'\0\2\xff\xff' * 40),
  'JPEG header of 65,535 x 65,535': with_size('plain.jpg', 65_535, 65_535),
  'WebP header of 16,383 x 16,383': with_size('lossy.webp', 16_383, 16_383),
  'GIF header of 65,535 x 65,535': with_size('palette.gif', 65_535, 65_535),
  'JPEG of 20,000 scans': many_scans_jpeg(),
}


@pytest.mark.parametrize('name', BOMBS)
def test_bombs(name):
  with limits(2, 200 * 2**20), pytest.raises(images.BadImageError):
    images.decode(BOMBS[name], SIZE, 3)


def test_text_bomb():
  chunk = data_lib.png_chunk(b'zTXt', b'comment\0\0' + data_lib.compressed_zeros(2**28))
  content = FILES['rgb.png'][:33] + chunk + FILES['rgb.png'][33:]
  with limits(40, 200 * 2**20):
    check(content)


@pytest.mark.slow
def test_largest_images():
  """Images just below the size limit take less than 1.6 GiB of memory."""
  processes.run_program('largest_images')


@pytest.mark.parametrize('name', ['plain.jpg', 'exif.png'])
def test_damaged_exif_data_are_ignored(name):
  rotated = images.decode(FILES[name], SIZE, 3)
  kind = {'jpg': 'JPEG', 'png': 'PNG'}[name[-3:]]
  plain = images.decode(encode(photo(40, 56, 3), kind), SIZE, 3)
  assert (rotated != plain).any()
  damaged = with_valid_checksums(FILES[name].replace(b'MM\0*', b'!!\0*'))
  assert damaged != FILES[name]
  np.testing.assert_array_equal(images.decode(damaged, SIZE, 3), plain)
