"""Damaged and malicious image files: an array or a BadImageError, in bounded time and memory."""

import io
import pathlib
import resource
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import zlib

import hypothesis
import numpy as np
import PIL.Image
import pytest
from hypothesis import strategies as st

from farmer_jax import config, errors
from farmer_jax.data import images, sources

SIZE = 16

# Of Pillow, about large images.
pytestmark = pytest.mark.filterwarnings('ignore')


def photo(height, width, channels):
  """A picture with edges and noise, uint8 [height, width, channels]."""
  random = np.random.default_rng(height)
  y, x = np.mgrid[:height, :width]
  smooth = np.stack([5 * x + y, 3 * y, 200 - x - y, 255 - 4 * x][:channels], -1)
  return (smooth + random.integers(0, 30, (height, width, channels))).astype(np.uint8)


def encode(pixels, kind, mode=None, **options):
  image = PIL.Image.fromarray(pixels)
  image = image.convert(mode) if mode else image
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def exif():
  values = PIL.Image.Exif()
  values[0x0112] = 6
  values[0x010E] = 'a description'
  return values


def whole_files():
  """Files of every kind, by name."""
  rgb, rgba = photo(40, 56, 3), photo(33, 47, 4)
  frames = [PIL.Image.fromarray(photo(20 + k, 30, 3)).resize((30, 24)) for k in range(3)]
  animated = {'save_all': True, 'append_images': frames[1:]}
  grey16 = (photo(20, 30, 1)[..., 0].astype(np.uint16) << 8) + 77
  files = {
    'rgb.png': encode(rgb, 'PNG'),
    'rgba.png': encode(rgba, 'PNG'),
    'palette.png': encode(rgb, 'PNG', 'P', transparency=3),
    'grey16.png': encode(grey16, 'PNG'),
    'bits.png': encode(rgb, 'PNG', '1'),
    'exif.png': encode(rgb, 'PNG', exif=exif()),
    'plain.jpg': encode(rgb, 'JPEG', exif=exif()),
    'progressive.jpg': encode(rgb, 'JPEG', progressive=True, optimize=True),
    'cmyk.jpg': encode(rgb, 'JPEG', 'CMYK'),
    'lossy.webp': encode(rgb, 'WEBP', quality=50, exif=exif()),
    'lossless.webp': encode(rgba, 'WEBP', lossless=True),
    'rgb.bmp': encode(rgb, 'BMP'),
    'palette.bmp': encode(rgb, 'BMP', 'P'),
    'rle.bmp': rle_bmp(30, 20, bytes([30, 7, 0, 0]) * 20 + b'\0\1'),
    'palette.gif': encode(rgb, 'GIF'),
  }
  for kind, name in (('PNG', 'apng.png'), ('WEBP', 'moving.webp'), ('GIF', 'moving.gif')):
    stream = io.BytesIO()
    frames[0].save(stream, kind, **animated)
    files[name] = stream.getvalue()
  return files


def rle_bmp(width, height, data):
  """A run-length encoded BMP file of 256 greys."""
  palette = b''.join(bytes([v, v, v, 0]) for v in range(256))
  offset = 14 + 40 + len(palette)
  header = struct.pack('<IiiHHIIiiII', 40, width, height, 1, 8, 1, len(data), 2835, 2835, 256, 256)
  return struct.pack('<2sIHHI', b'BM', offset + len(data), 0, 0, offset) + header + palette + data


FILES = whole_files()


@pytest.mark.parametrize('name', FILES)
def test_whole_files(name):
  for channels in (1, 3):
    assert images.decode(FILES[name], SIZE, channels).shape == (SIZE, SIZE, channels)


def repaired(content):
  """A PNG file with its checksums made right, so that damage gets past them."""
  if content[:8] != b'\x89PNG\r\n\x1a\n':
    return content
  parts, at = [content[:8]], 8
  while at + 12 <= len(content):
    length = int.from_bytes(content[at : at + 4], 'big')
    body = content[at + 4 : at + 8 + length]
    parts += [content[at : at + 4], body, struct.pack('>I', zlib.crc32(body))]
    at += 12 + length
  return b''.join(parts)


# Where the formats keep width and height: offset, format of struct.
DIMENSIONS = {
  'png': [(16, '>I'), (20, '>I')],
  'bmp': [(18, '<i'), (22, '<i')],
  'gif': [(6, '<H'), (8, '<H')],
  'webp': [(24, '<H'), (26, '<H'), (27, '<H')],
}


def set_dimension(content, name, which, value):
  content = bytearray(content)
  places = DIMENSIONS.get(name.rpartition('.')[2])
  if places is None:  # JPEG: in a segment whose place varies.
    starts = [content.find(bytes([255, marker])) for marker in (0xC0, 0xC1, 0xC2)]
    places = [(start + offset, '>H') for start in starts if start > 0 for offset in (5, 7)]
  if not places:
    return bytes(content)
  offset, kind = places[which % len(places)]
  bits = 8 * struct.calcsize(kind) - (kind[-1] == 'i')
  if offset + struct.calcsize(kind) <= len(content):
    struct.pack_into(kind, content, offset, value % 2**bits)
  return bytes(content)


SIZES = st.one_of(
  st.integers(0, 70),
  st.sampled_from([0, 1, 255, 4096, 2**14 - 1, 2**15, 2**16 - 1, 2**16, 2**20, 2**31 - 1]),
)


@st.composite
def damaged_files(draw):
  """The name of a file and its content, damaged in a few ways."""
  name = draw(st.sampled_from(sorted(FILES)))
  content = FILES[name]
  for _ in range(draw(st.integers(1, 3))):
    kind = draw(st.sampled_from(['flip', 'flip', 'cut', 'splice', 'size', 'insert', 'remove']))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if draw(st.booleans()):  # Headers are short, and worth half of the damage.
      at %= 64
    if kind == 'flip':
      length = draw(st.integers(1, 4))
      noise = draw(st.binary(min_size=length, max_size=length))
      content = content[:at] + noise + content[at + length :]
    elif kind == 'cut':
      content = content[:at]
    elif kind == 'splice':
      other = FILES[draw(st.sampled_from(sorted(FILES)))]
      content = content[:at] + other[at % len(other) :]
    elif kind == 'size':
      content = set_dimension(content, name, draw(st.integers(0, 3)), draw(SIZES))
    elif kind == 'insert':
      content = content[:at] + draw(st.binary(max_size=40)) + content[at:]
    else:
      content = content[:at] + content[at + draw(st.integers(1, 40)) :]
  return name, repaired(content) if draw(st.booleans()) else content


def peak_memory():
  """The most memory that this process has had, bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(content):
  """Decodes in both ways of counting channels; True where the file was an image."""
  found = []
  for channels in (1, 3):
    start, memory = time.monotonic(), peak_memory()
    try:
      image = images.decode(content, SIZE, channels)
    except images.BadImageError as error:
      message = str(error)
      assert message
      assert '\n' not in message
      assert ' at 0x' not in message
      found.append(False)
    else:
      assert (image.dtype, image.shape) == (np.uint8, (SIZE, SIZE, channels))
      found.append(True)
    assert time.monotonic() - start < 20
    assert peak_memory() - memory < 1.5 * 2**30
  assert found[0] == found[1]
  try:
    images.check_header(io.BytesIO(content))
  except images.BadImageError:
    assert not found[0]
  return found[0]


def fuzz(examples):
  @hypothesis.settings(
    deadline=None,
    derandomize=True,
    max_examples=examples,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(damaged_files())
  def run(damaged):
    seen.append(check(damaged[1]))

  seen: list[bool] = []
  run()
  return seen


def test_damaged_files():
  seen = fuzz(800)
  assert 0.05 < np.mean(seen) < 0.95  # Damage of all degrees.


@pytest.mark.slow
def test_many_damaged_files():
  fuzz(60_000)


@hypothesis.settings(deadline=None, derandomize=True, max_examples=200, database=None)
@hypothesis.given(st.binary(max_size=200))
def test_any_bytes(content):
  check(content)


@hypothesis.settings(deadline=None, derandomize=True, max_examples=25, database=None)
@hypothesis.given(st.lists(damaged_files(), min_size=3, max_size=8), st.booleans())
def test_folder_of_damaged_files(files, skip):
  """Images, or an error of one line that names a file."""
  with tempfile.TemporaryDirectory() as root:
    for index, (name, content) in enumerate(files):
      kind = name.rpartition('.')[2].replace('gif', 'png')
      (pathlib.Path(root) / f'{index}.{kind}').write_bytes(content)
    (pathlib.Path(root) / 'whole.png').write_bytes(FILES['rgb.png'])
    data = config.Data(
      source='folder',
      path=root,
      image_size=SIZE,
      channels=3,
      num_classes=0,
      valid_fraction=0,
      bad_files='skip' if skip else 'stop',
    )
    try:
      source = sources.load(data, 'train')
    except errors.ConfigError as error:
      assert not skip
      assert str(error).startswith(root)
      assert '\n' not in str(error)
    else:
      assert 1 <= len(source) <= len(files) + 1
      assert source[0]['image'].shape == (SIZE, SIZE, 3)


def png(width, height, depth, colour, data):
  chunks = [
    (b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)),
    (b'PLTE', bytes(3 * 256)),
    (b'tRNS', bytes(256)),
    (b'IDAT', data),
    (b'IEND', b''),
  ]
  if colour != 3:
    chunks = [chunk for chunk in chunks if chunk[0] not in (b'PLTE', b'tRNS')]
  parts = [b'\x89PNG\r\n\x1a\n']
  for name, content in chunks:
    checksum = struct.pack('>I', zlib.crc32(name + content))
    parts += [struct.pack('>I', len(content)), name, content, checksum]
  return b''.join(parts)


def zeros(count):
  """`count` zero bytes, compressed, made without them."""
  compressor = zlib.compressobj(9)
  parts = [compressor.compress(bytes(2**20)) for _ in range(count // 2**20)]
  return b''.join([*parts, compressor.compress(bytes(count % 2**20)), compressor.flush()])


def endless_jpeg():
  """A progressive JPEG of 65,000 by 2,000 pixels that repeats an empty scan 20,000 times."""
  content = set_dimension(FILES['progressive.jpg'], 'x.jpg', 0, 2000)
  content = set_dimension(content, 'x.jpg', 1, 65_000)
  start = content.rfind(b'\xff\xda')
  length = int.from_bytes(content[start + 2 : start + 4], 'big')
  scan = content[start : start + 2 + length]
  return content[:-2] + 20_000 * scan + content[-2:]


def bombs():
  """Files that ask for far more memory or time than they have bytes."""
  giant = 50_000
  yield 'header of 50,000²', png(giant, giant, 8, 2, zeros(1000))
  yield 'zeros of 13,000²', png(13_000, 13_000, 8, 0, zeros(13_001 * 13_000))
  yield 'a line of 2**27', png(2**27, 1, 8, 0, zeros(2**27 + 1))
  yield 'bits of 40,000²', png(40_000, 40_000, 1, 0, zeros(5001 * 40_000))
  yield 'RLE skipping', rle_bmp(2**27, 1, b'\0\2\xff\xff' * 40)
  yield (
    'JPEG of 65,535²',
    set_dimension(set_dimension(FILES['plain.jpg'], 'x.jpg', 0, 65_535), 'x.jpg', 1, 65_535),
  )
  yield (
    'WebP header',
    set_dimension(set_dimension(FILES['lossy.webp'], 'x.webp', 0, 16_383), 'x.webp', 1, 16_383),
  )
  yield (
    'GIF of 65,535²',
    set_dimension(set_dimension(FILES['palette.gif'], 'x.gif', 0, 65_535), 'x.gif', 1, 65_535),
  )
  yield 'endless scans', endless_jpeg()


BOMBS = dict(bombs())


@pytest.mark.parametrize('name', BOMBS)
def test_bombs(name):
  content = BOMBS[name]
  start, before = time.monotonic(), peak_memory()
  with pytest.raises(images.BadImageError):
    images.decode(content, SIZE, 3)
  assert time.monotonic() - start < 2
  assert peak_memory() - before < 200 * 2**20


def test_text_bomb():
  """Compressed text in a PNG is not blown up either, and the pixels are good or not."""
  text = b'zTXt' + b'comment\0\0' + zeros(2**28)
  chunk = struct.pack('>I', len(text) - 4) + text + struct.pack('>I', zlib.crc32(text))
  content = FILES['rgb.png'][:33] + chunk + FILES['rgb.png'][33:]
  before = peak_memory()
  check(content)
  assert peak_memory() - before < 200 * 2**20


@pytest.mark.slow
def test_largest_images():
  """Just below the limits, in a process of their own: a second or so and about a gigabyte each."""
  program = """
    import resource, sys, time
    from tests.faults import test_image_fuzz as t
    from farmer_jax.data import images
    side = 11_584
    for depth, colour, row in ((8, 0, 1), (16, 0, 2), (8, 3, 1), (8, 2, 3), (8, 6, 4)):
      content = t.png(side, side, depth, colour, t.zeros((row * side + 1) * side))
      start = time.monotonic()
      assert images.decode(content, 256, 3).shape == (256, 256, 3)
      peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
      print(depth, colour, round(time.monotonic() - start, 1), 's', round(peak, 2), 'GiB')
      assert peak < 1.6, peak
  """
  subprocess.run([sys.executable, '-c', textwrap.dedent(program)], check=True)


@pytest.mark.parametrize('name', ['plain.jpg', 'exif.png'])
def test_damaged_exif_does_not_spoil_an_image(name):
  whole = images.decode(FILES[name], SIZE, 3)
  kind = {'jpg': 'JPEG', 'png': 'PNG'}[name[-3:]]
  plain = images.decode(encode(photo(40, 56, 3), kind), SIZE, 3)
  assert (whole != plain).any()
  damaged = repaired(FILES[name].replace(b'MM\0*', b'!!\0*'))
  assert damaged != FILES[name]
  np.testing.assert_array_equal(images.decode(damaged, SIZE, 3), plain)
