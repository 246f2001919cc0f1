"""Grids of images, and plots, as arrays and PNG files."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

# Small images are enlarged by an integer factor to about this height, in pixels.
_CELL_PIXELS = 56
_GAP = 4  # pixels between images

Picture = UInt8[np.ndarray, 'height width 3']


def sample_grid(
  images: UInt8[np.ndarray, 'rows columns H W C'],
  row_names: Sequence[str] = (),
  column_names: Sequence[str] = (),
) -> Picture:
  """Draws a grid of images, with names to the left of rows and above columns."""
  rows, columns, height, width, _ = images.shape
  scale = max(1, _CELL_PIXELS // height)
  images = images.repeat(scale, axis=2).repeat(scale, axis=3)
  height, width = height * scale, width * scale
  font = ImageFont.load_default(size=14)
  margin = _GAP + max((int(font.getlength(name)) + 2 * _GAP for name in row_names), default=0)
  header = 22 if column_names else _GAP
  size = margin + columns * (width + _GAP), header + rows * (height + _GAP)
  canvas = Image.new('RGB', size, 'white')
  draw = ImageDraw.Draw(canvas)
  lefts = [margin + column * (width + _GAP) for column in range(columns)]
  for left, name in zip(lefts, column_names, strict=False):
    draw.text((left + width // 2, header // 2), name, fill='black', font=font, anchor='mm')
  for row in range(rows):
    top = header + row * (height + _GAP)
    if row_names:
      draw.text((_GAP, top + height // 2), row_names[row], fill='black', font=font, anchor='lm')
    for image, left in zip(images[row], lefts, strict=True):
      canvas.paste(Image.fromarray(as_rgb(image)), (left, top))
  return np.asarray(canvas)


def as_rgb(image: UInt8[np.ndarray, 'H W C']) -> UInt8[np.ndarray, 'H W 3']:
  """Repeats a gray image in three channels. Returns an RGB image unchanged."""
  return image if image.shape[-1] == 3 else image.repeat(3, axis=-1)


def save_png(path: epath.Path, image: Picture) -> None:
  """Writes a PNG file. Missing folders are created."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('wb') as file:
    Image.fromarray(image).save(file, format='png')


def plot(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
  """Returns a matplotlib figure of `size` inches and its axes [rows, columns].

  `Figure.subplots` receives the options.
  """
  # The import takes a second, and most jobs draw no plots.
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout='constrained')
  return figure, figure.subplots(rows, columns, squeeze=False, **options)


def to_array(figure: Any) -> Picture:
  """Renders a matplotlib figure."""
  stream = io.BytesIO()
  figure.savefig(stream, format='png', dpi=100)
  return np.asarray(Image.open(stream).convert('RGB'))


def training_curves(path: epath.Path, records: Sequence[dict[str, Any]], title: str) -> Picture:
  """Draws the losses in records of metrics.jsonl and the terms of the training loss, as a PNG file.

  A third panel shows the Fréchet distances of samples, if training measured them. Returns the
  picture.
  """
  name = 'bits_per_dim' if any('bits_per_dim' in r for r in records) else 'loss'
  is_likelihood = any('log_det' in r for r in records)
  unit = 'nats/dim' if is_likelihood else 'mean squared error'
  blocks = sorted({term for r in records for term in r if term.startswith('loss_block_')})
  terms = ['nll_informative', 'nll_redundant', 'log_det'] if is_likelihood else blocks

  def draw(panel: Any, split: str, name: str, style: str, label: str) -> None:
    points = [(r['step'], r[name]) for r in records if r['split'] == split and name in r]
    if points:
      panel.plot(*zip(*points, strict=True), style, label=label)

  names = {name for r in records for name in r if r['split'] == 'fidelity'}
  distances = sorted(n for n in names if n.startswith(('fid_', 'classifier_frechet_distance_')))
  panels = 3 if distances else 2
  figure, axes = plot(1, panels, size=(5.5 * panels, 4))
  left, right, *more = axes[0]
  draw(left, 'train', name, '-', 'train')
  draw(left, 'valid', name, 'o-', 'valid')
  values = [r[name] for r in records if r['split'] == 'train' and np.isfinite(r.get(name, np.nan))]
  if values:
    # Without a limit, the high losses of the first steps would hide the rest of the curve.
    low, high = min(values), np.quantile(values, 0.9)
    left.set_ylim(low - 0.1 * (high - low) - 0.01, high + 0.1 * (high - low) + 0.01)
  left.set(xlabel='step', ylabel='bits/dim' if name == 'bits_per_dim' else f'loss, {unit}')
  for term in terms:
    draw(right, 'train', term, '-', term)
  right.set(xlabel='step', ylabel=f'terms of the loss, {unit}')
  for name in distances:
    draw(more[0], 'fidelity', name, 'o-', name)
    more[0].set(xlabel='step', ylabel='Fréchet distance of samples')
  for panel in axes[0]:
    if panel.lines:
      panel.legend()
  figure.suptitle(title)
  picture = to_array(figure)
  save_png(path, picture)
  return picture
