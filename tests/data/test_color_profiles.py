"""Embedded color profiles: colors are converted to sRGB."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from farmer_jax.data import images

ADOBE_GAMMA = 2.19921875
# Columns: XYZ of red, green and blue, for the white of profiles (D50).
ADOBE = np.array(
  [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB = np.array(
  [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
COLORS = np.array([[200, 120, 90], [90, 160, 100], [60, 70, 180], [128, 128, 128], [255, 255, 255]])


def profile(kind, tags):
  """Returns an ICC profile (version 2) of a color space `kind` with the data of each tag."""
  count, offset, table, body = len(tags), 128 + 4 + 12 * len(tags), b'', b''
  for name, content in tags.items():
    content += bytes(-len(content) % 4)
    table += struct.pack('>4sII', name, offset + len(body), len(content))
    body += content
  header = struct.pack(
    *('>I4sI4s4s4s12s4s4sIIIQI3I', offset + len(body), b'', 0x02100000, b'mntr', kind, b'XYZ '),
    *(bytes(12), b'acsp', b'', 0, 0, 0, 0, 0, 0xF6D6, 0x10000, 0xD32D),
  )
  return header.ljust(128, b'\0') + struct.pack('>I', count) + table + body


def xyz(values):
  return b'XYZ \0\0\0\0' + struct.pack('>3i', *(round(v * 65536) for v in values))


GAMMA_CURVE = b'curv\0\0\0\0' + struct.pack('>IH', 1, round(ADOBE_GAMMA * 256))
WHITE = xyz((0.9642, 1.0, 0.8249))
DESCRIPTION = b'desc\0\0\0\0' + struct.pack('>I', 5) + b'Wide\0' + bytes(78)
CURVES = dict.fromkeys((b'rTRC', b'gTRC', b'bTRC'), GAMMA_CURVE)
PRIMARIES = dict(zip((b'rXYZ', b'gXYZ', b'bXYZ'), map(xyz, ADOBE.T), strict=True))
ADOBE_RGB = profile(b'RGB ', {b'desc': DESCRIPTION, b'wtpt': WHITE, **PRIMARIES, **CURVES})
GRAY = profile(b'GRAY', {b'desc': DESCRIPTION, b'wtpt': WHITE, b'kTRC': GAMMA_CURVE})


def encode_srgb(linear):
  curve = 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055
  return np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, curve)).clip(0, 255)


def expected(colors):
  """Converts Adobe RGB to sRGB, in float64."""
  return encode_srgb((colors / 255) ** ADOBE_GAMMA @ (np.linalg.inv(SRGB) @ ADOBE).T)


def decode(color, icc_profile, channels=3, mode='RGB', file_format='PNG'):
  """Returns one pixel of a decoded image of one color."""
  image = Image.new(mode, (16, 16), tuple(map(int, color)) if len(color) > 1 else int(color[0]))
  stream = io.BytesIO()
  image.save(stream, file_format, icc_profile=icc_profile)
  return images.decode(stream.getvalue(), 8, channels)[4, 4].astype(float)


@pytest.mark.parametrize('color', COLORS.tolist())
def test_adobe_rgb_is_converted(color):
  np.testing.assert_allclose(decode(color, ADOBE_RGB), expected(np.array(color)), atol=1.5)


def test_the_conversion_matters():
  assert np.abs(decode([90, 160, 100], ADOBE_RGB) - [90, 160, 100]).max() > 20


def test_gray_of_a_color_profile():
  red, green, blue = expected(COLORS[0])
  (found,) = decode(COLORS[0], ADOBE_RGB, channels=1)
  assert found == pytest.approx(0.299 * red + 0.587 * green + 0.114 * blue, abs=1.5)


def test_gray_profile():
  (found,) = decode([60], GRAY, channels=1, mode='L')
  assert found == pytest.approx(encode_srgb((60 / 255) ** ADOBE_GAMMA), abs=1.5)


def test_transparent_pixels_are_over_white():
  np.testing.assert_array_equal(decode([90, 160, 100, 0], ADOBE_RGB, mode='RGBA'), 255)
  found = decode([*COLORS[0], 255], ADOBE_RGB, mode='RGBA')
  np.testing.assert_allclose(found, expected(COLORS[0]), atol=1.5)


@pytest.mark.parametrize(
  'icc_profile, mode, color',
  [
    (None, 'RGB', [200, 120, 90]),
    (ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(), 'RGB', [200, 120, 90]),
    (b'damaged', 'RGB', [200, 120, 90]),
    (ADOBE_RGB[:300], 'RGB', [200, 120, 90]),
    (GRAY, 'RGB', [200, 120, 90]),  # The profile of another color space.
    (ADOBE_RGB, 'L', [60]),
  ],
)
def test_colors_without_a_usable_profile_stay(icc_profile, mode, color):
  np.testing.assert_array_equal(decode(color, icc_profile, len(color), mode), color)
