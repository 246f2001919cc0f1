"""Makes a folder of emoji: a small dataset of color images in nine classes.

    python -m benchmarks.emoji --out=EMOJI

Writes 7,562 PNG images of 64×64 pixels to OUT/train/CATEGORY and OUT/valid/CATEGORY, for
`config.data.source=folder`: the emoji of two vendors, with all skin tones, on white. Every tenth
emoji is used for validation only, in all of its variants.

The images are in two npm packages, which the program npm downloads. To use downloaded packages:
--packages=emoji-datasource-google-16.0.0.tgz,emoji-datasource-twitter-16.0.0.tgz. Licenses of the
images: Google's (Noto) Apache License 2.0, Twitter's (Twemoji) CC BY 4.0.
"""

import collections
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import app, flags, logging
from PIL import Image

from benchmarks import shared_flags
from farmer_jax import terminal
from farmer_jax.errors import UserError

VENDORS = ('google', 'twitter')
_VERSION = '16.0.0'
_VALID_EVERY = 10

_PACKAGES = flags.DEFINE_list('packages', None, 'Downloaded npm packages, .tgz.')


def download(folder: pathlib.Path) -> list[pathlib.Path]:
  """Downloads the npm packages to `folder`. Returns their paths.

  Raises:
    UserError: npm is not installed, or the download failed.
  """
  paths = []
  for vendor in VENDORS:
    package = f'emoji-datasource-{vendor}@{_VERSION}'
    logging.info(f'Downloading {package} ...')
    try:
      command = ['npm', 'pack', '--silent', package]
      result = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
      raise UserError(
        'npm is not installed; install Node.js, or download the npm packages'
        ' emoji-datasource-google and emoji-datasource-twitter, and set --packages'
      ) from None
    except subprocess.CalledProcessError as error:
      raise UserError(f'npm could not download {package}: {error.stderr.strip()}') from None
    paths.append(folder / result.stdout.split()[-1])
  return paths


def images(package: pathlib.Path) -> Iterator[tuple[str, str, int, str, Image.Image]]:
  """Yields vendor, category, index of the emoji, name of the variant, and image on white.

  The index is the same for all variants of an emoji and for all packages.

  Raises:
    UserError: the file is not a package with the images of one of `VENDORS`.
  """
  try:
    with tarfile.open(package, 'r|gz') as archive:  # a stream: seeking would decompress again
      files = {
        member.name: opened.read()
        for member in archive
        if member.name.endswith(('/emoji.json', '.png')) and '/sheets' not in member.name
        if (opened := archive.extractfile(member))
      }
    entries = json.loads(files['package/emoji.json'])
    vendor = next(v for v in VENDORS if f'package/img/{v}/64/{entries[0]["image"]}' in files)
    for index, (category, variants) in enumerate(_emoji(entries)):
      for variant in variants:
        if variant[f'has_img_{vendor}']:
          file = io.BytesIO(files[f'package/img/{vendor}/64/{variant["image"]}'])
          with Image.open(file) as image:
            yield vendor, category, index, variant['unified'].lower(), _on_white(image)
  except (OSError, tarfile.TarError, KeyError, StopIteration, ValueError) as error:
    raise UserError(f'--packages: {package} is not an emoji package ({error!r})') from None


def _emoji(entries: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
  """Yields the category and the variants of each emoji, in the order of the Unicode standard."""
  for entry in sorted(entries, key=lambda entry: entry['sort_order']):
    if entry['category'] != 'Component':  # skin tones and hair without a person
      variants = [entry, *entry.get('skin_variations', {}).values()]
      yield entry['category'].lower().replace(' & ', '_and_'), variants


def _on_white(image: Image.Image) -> Image.Image:
  image = image.convert('RGBA')
  return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')


def write(packages: list[pathlib.Path], out: pathlib.Path) -> collections.Counter[str]:
  """Writes the images to a new folder. Returns the number of images by split and category."""
  counts: collections.Counter[str] = collections.Counter()
  # All packages are read first, so that a wrong package leaves no incomplete folder.
  found = [image for package in packages for image in images(package)]
  for vendor, category, index, variant, image in found:
    split = 'valid' if index % _VALID_EVERY == 0 else 'train'
    folder = out / split / category
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f'{variant}-{vendor}.png')
    counts[f'{split}/{category}'] += 1
  return counts


def main(argv: list[str]) -> None:
  """Writes the images, and prints their numbers."""
  del argv
  out = shared_flags.new_folder()
  try:
    with tempfile.TemporaryDirectory() as folder:
      packages = [pathlib.Path(path) for path in _PACKAGES.value or ()]
      counts = write(packages or download(pathlib.Path(folder)), out)
  except UserError as error:
    terminal.print_error(error)
    sys.exit(1)
  for name, count in sorted(counts.items()):
    logging.info(f'{name}: {count} images')


if __name__ == '__main__':
  app.run(main)
