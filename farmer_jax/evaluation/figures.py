"""Pictures that a run leaves behind."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Small images are enlarged to about this many pixels a side, so that people can see them.
_CELL_PIXELS = 56


def sample_grid(images, row_names=(), column_names=()):  # uint8 [rows, columns, H, W, C]
  """Lays out images in rows, with names before rows and above columns; uint8 [height, width, 3]."""
  rows, columns, height, width, _ = images.shape
  scale = max(1, _CELL_PIXELS // height)
  images = images.repeat(scale, axis=2).repeat(scale, axis=3)
  gap = 4
  cell_height, cell_width = height * scale + gap, width * scale + gap
  font = ImageFont.load_default(size=14)
  margin = gap + max((int(font.getlength(name)) + 2 * gap for name in row_names), default=0)
  header = 22 if column_names else gap
  canvas = Image.new('RGB', (margin + columns * cell_width, header + rows * cell_height), 'white')
  draw = ImageDraw.Draw(canvas)
  for column, name in enumerate(column_names):
    middle = margin + column * cell_width + width * scale // 2
    draw.text((middle, header // 2), name, fill='black', font=font, anchor='mm')
  for row in range(rows):
    top = header + row * cell_height
    if row_names:
      middle = top + height * scale // 2
      draw.text((gap, middle), row_names[row], fill='black', font=font, anchor='lm')
    for column in range(columns):
      image = Image.fromarray(as_rgb(images[row, column]))
      canvas.paste(image, (margin + column * cell_width, top))
  return np.asarray(canvas)


def as_rgb(image):  # uint8 [H, W, C]
  """[H, W, 3], whether grey or in colours."""
  return image if image.shape[-1] == 3 else image.repeat(3, axis=-1)


def save_png(path, image):  # uint8 [H, W, 3]
  """Writes a picture, to any path that etils knows; the folder is made."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('wb') as file:
    Image.fromarray(image).save(file, format='png')


def training_curves(path, records, title):
  """Draws the loss of training and validation, and its terms, from the records of metrics.jsonl."""
  # Imported late: matplotlib takes a second to load, and only the end of a run needs it.
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  name = 'bits_per_dim' if any('bits_per_dim' in r for r in records) else 'loss'
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout='constrained')
  for split, style in (('train', '-'), ('valid', 'o-')):
    points = [(r['step'], r[name]) for r in records if r['split'] == split and name in r]
    if points:
      left.plot(*zip(*points, strict=True), style, label=split)
  values = [r[name] for r in records if r['split'] == 'train' and np.isfinite(r.get(name, np.nan))]
  if values:
    # The first steps are far above the rest and would hide it.
    low, high = min(values), np.quantile(values, 0.9)
    left.set_ylim(low - 0.1 * (high - low) - 0.01, high + 0.1 * (high - low) + 0.01)
  likelihood = any('log_det' in r for r in records)
  unit = 'nats/dim' if likelihood else 'mean squared error'
  left.set(xlabel='step', ylabel='bits/dim' if name == 'bits_per_dim' else f'loss, {unit}')
  left.legend()
  terms = {term for r in records for term in r if term.startswith('loss_block_')}
  for term in ('nll_informative', 'nll_redundant', 'log_det') if likelihood else sorted(terms):
    points = [(r['step'], r[term]) for r in records if r['split'] == 'train' and term in r]
    if points:
      right.plot(*zip(*points, strict=True), label=term)
  right.set(xlabel='step', ylabel=f'terms of the loss, {unit}')
  right.legend()
  figure.suptitle(title)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('wb') as file:
    figure.savefig(file, format='png', dpi=100)
  pyplot.close(figure)
