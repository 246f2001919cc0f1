"""Cuts small crops from photographs: a dataset of natural images for tests of the training recipe.

    apt-get install mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
    python -m benchmarks.photo_crops --out=crops

Writes 32×32 crops to OUT/train and OUT/valid, for `config.data.source=folder`. Every fifth
photograph is used for validation only. All photographs are first resized to the same shorter side,
so that crops have detail and objects of similar size.
"""

import pathlib

import numpy as np
from absl import app, flags, logging
from PIL import Image

from benchmarks import shared_flags

# Photographs in Debian's packages. The packages also contain drawings and patterns.
_FOLDER = pathlib.Path('/usr/share/backgrounds')
_DEBIAN_PHOTOS = (
  'mate/nature/*.jpg',
  'Bridge_by_*.jpg',
  'Dragonfly_by_*.jpg',
  'Kleiber_by_*.jpg',
  'Picture_*_by_*.jpg',
  'Wine_by_*.jpg',
  'aitzgorri_by_*.jpg',
  'fr*_by_*.jpg',
  'greentock_by_*.jpg',
  'life_by_*.jpg',
  'picosdeeuropa_by_*.jpg',
  'seeding_by_*.jpg',
  'sunset_by_*.jpg',
)

_PHOTOS = flags.DEFINE_list('photos', None, 'Image files. Default: photos of the Debian packages.')
_SIDE = flags.DEFINE_integer('side', 320, 'Shorter side of the resized photographs, pixels.')
_SIZE = flags.DEFINE_integer('size', 32, 'Height and width of a crop, pixels.')
_COUNT = flags.DEFINE_integer('count', 1000, 'Crops per photograph for training.')
_VALID_COUNT = flags.DEFINE_integer('valid_count', 170, 'Crops per photograph for validation.')


def debian_photos() -> list[pathlib.Path]:
  """Returns the photographs of the Debian packages that are installed."""
  return sorted(path for pattern in _DEBIAN_PHOTOS for path in _FOLDER.glob(pattern))


def crops(
  photo: Image.Image, side: int, size: int, count: int, rng: np.random.Generator
) -> list[np.ndarray]:
  """Resizes the shorter side to `side`. Returns random crops, uint8 [size, size, 3]."""
  scale = side / min(photo.size)
  resized = photo.convert('RGB').resize(
    (round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS
  )
  pixels = np.asarray(resized)
  corners = rng.integers(np.array(pixels.shape[:2]) - size + 1, size=(count, 2))
  return [pixels[y : y + size, x : x + size] for y, x in corners]


def main(argv: list[str]) -> None:
  """Writes the crops."""
  del argv
  paths = [pathlib.Path(path) for path in _PHOTOS.value or debian_photos()]
  rng, out = np.random.default_rng(0), shared_flags.new_folder()
  if missing := [str(path) for path in paths if not path.is_file()]:
    raise app.UsageError(f'--photos: no file {missing[0]}')
  if len(paths) < 5:
    raise app.UsageError(f'at least 5 --photos are needed, not {len(paths)}')
  if _SIZE.value > _SIDE.value:
    raise app.UsageError(f'--size={_SIZE.value} must be at most --side={_SIDE.value}')
  for index, path in enumerate(sorted(paths, key=lambda path: path.name.lower())):
    split = 'valid' if index % 5 == 2 else 'train'
    (out / split).mkdir(parents=True, exist_ok=True)
    count = _VALID_COUNT.value if split == 'valid' else _COUNT.value
    with Image.open(path) as photo:
      cut = crops(photo, _SIDE.value, _SIZE.value, count, rng)
      for number, crop in enumerate(cut):
        Image.fromarray(crop).save(out / split / f'{path.stem}-{number}.png')
    logging.info(f'{path.name}: {count} crops for {split}')


if __name__ == '__main__':
  app.run(main)
