"""Statistics, tables and figures of the likelihoods of many images.

Statistics are computed in float64. Sums do not depend on the order of the images.

`Rows` are the results of `scoring.Scoring.score`: arrays with one row for each image.
"""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Float, Int, UInt8
from sklearn import metrics

from farmer_jax.data import base
from farmer_jax.evaluation import figures
from farmer_jax.evaluation.figures import Picture
from farmer_jax.ops import units

TERMS = ('nll_informative', 'nll_redundant', 'log_det', 'nll_class')

# Rows and columns of the grids of images with the highest and with the lowest likelihood.
_EXTREME_ROWS, _EXTREME_COLUMNS = 2, 8
_MAX_CLASSES = 20  # in one figure

Rows = dict[str, np.ndarray]
Indices = Int[np.ndarray, 'n']
Values = Float[np.ndarray, 'n']


class Detection(NamedTuple):
  """Out-of-distribution detection by one score of the images of two datasets."""

  auroc: float  # probability that an image of the model's dataset has the higher score
  scores: Values
  ood_scores: Values


def summarize(rows: Rows, class_names: Sequence[str] = ()) -> dict[str, Any]:
  """Returns means and standard errors over the images of a split as a JSON-serializable dict.

  A mean is None if a value is not finite. `nonfinite_images` lists the images whose loss is not
  finite, and `mean_of_finite` is the mean loss of the other images. Without `class_names`, the
  accuracy and the means by class are missing.
  """
  values = _select(rows, ('bits_per_dim', 'bits_per_dim_importance', 'loss'))
  finite = np.isfinite(rows['loss'])
  summary: dict[str, Any] = {
    'count': len(rows['loss']),
    'nonfinite_images': rows['index'][~finite].tolist(),
    **{name: _mean_and_error(array) for name, array in values.items()},
    **{name: _mean(rows[name]) for name in TERMS if name in rows},
    'log_det_by_block': [_mean(block) for block in rows['log_dets'].T],
    'nll_by_token': [_mean(token) for token in rows['tokens'].T],
  }
  if not finite.all():
    summary['mean_of_finite'] = _mean(rows['loss'][finite])
  if 'predicted' in rows and class_names:
    summary['accuracy'] = _mean(rows['predicted'] == rows['label'])
  if class_names:
    masks = {class_names[label]: rows['label'] == label for label in np.unique(rows['label'])}
    summary['classes'] = {
      name: {'count': int(mask.sum()), **{key: _mean(values[key][mask]) for key in values}}
      for name, mask in masks.items()
    }
  return summary


def detect_ood(rows: Rows, ood_rows: Rows, dims: int) -> dict[str, Detection]:
  """Detects out-of-distribution images by likelihood.

  The rows of both datasets have `png_bits`. Images have `dims` = H·W·C dimensions.

  Returns:
    Results by the name of the score. `log_density` is log₂ p(x) in bits/image.
    `complexity_corrected` adds the length of the image as a PNG, because simple images have high
    likelihoods under any model (Serrà et al. 2020, arXiv 1909.11480).
  """
  log_density, corrected = [], []
  for r in (rows, ood_rows):
    nats_per_dim = np.asarray(r.get('loss_importance', r['loss']), np.float64)
    log_density.append(-nats_per_dim * dims / math.log(2))
    corrected.append(log_density[-1] + r['png_bits'])
  in_distribution = np.repeat([1, 0], [len(scores) for scores in log_density])
  detections = {}
  for name, scores in {'log_density': log_density, 'complexity_corrected': corrected}.items():
    values = np.concatenate(scores)
    # Scores that are not finite rank lowest.
    ranked = np.where(np.isfinite(values), values, -np.finfo(float).max)
    detections[name] = Detection(float(metrics.roc_auc_score(in_distribution, ranked)), *scores)
  return detections


def png_bits(image: UInt8[np.ndarray, 'H W C']) -> int:
  """Returns the length of an image as an optimized PNG, in bits."""
  stream = io.BytesIO()
  gray = image.shape[-1] == 1
  PIL.Image.fromarray(image[..., 0] if gray else image).save(stream, 'png', optimize=True)
  return 8 * stream.tell()


def with_bits(rows: Rows) -> Rows:
  """Adds bits/dim to the rows of uniformly dequantized images."""
  losses = _select(rows, ('loss', 'loss_importance'))
  return rows | {
    name.replace('loss', 'bits_per_dim'): units.bits_per_dim(loss.astype(np.float64))
    for name, loss in losses.items()
  }


def to_csv(rows: Rows) -> str:
  """Returns a CSV table with one line per image. Each flow block has a column."""
  columns = _select(rows, ('index', 'label', 'predicted'))
  columns |= _select(rows, ('bits_per_dim', 'bits_per_dim_importance', 'loss', *TERMS))
  columns |= {f'log_det_block_{t}': block for t, block in enumerate(rows['log_dets'].T)}
  columns |= _select(rows, ('png_bits',))
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(columns)
  writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
  return text.getvalue()


def to_text(report: dict[str, Any]) -> str:
  """Returns the main results of a likelihood report as text for the terminal."""
  lines, count = [], report['count']
  for name, value in (
    ('Negative log-likelihood', report.get('bits_per_dim', report['loss'])),
    ('Importance-weighted bound', report.get('bits_per_dim_importance')),
  ):
    if value and value['mean'] is not None:
      error = '' if value['standard_error'] is None else f' ± {value["standard_error"]:.4f}'
      lines.append(f'{name} ({count} images): {value["mean"]:.4f}{error} {report["unit"]}')
  if nonfinite := report['nonfinite_images']:
    shown = ', '.join(map(str, nonfinite[:20])) + (', …' if len(nonfinite) > 20 else '')
    lines.append(f'Images with a likelihood that is not finite: {len(nonfinite)} (indices {shown})')
  if 'accuracy' in report:
    lines.append(f'Classification accuracy: {report["accuracy"]:.4f}')
  change = report.get('change_by_dtype')
  if change and change['images']:
    lines.append(
      f'Change by bfloat16 ({change["images"]} images): mean {change["mean_nats_per_dim"]:+.2e}'
      f' nats/dim, largest {change["largest_nats_per_dim"]:.2e} nats/dim'
    )
  ood = report.get('ood', {'auroc': {}})
  for name, auroc in ood['auroc'].items():
    lines.append(f'Out-of-distribution detection, {ood["source"]}, {name}: AUROC {auroc:.4f}')
  return '\n'.join(lines)


def draw_figures(
  rows: Rows, source: base.Source, class_names: Sequence[str], unit: str
) -> dict[str, Picture]:
  """Draws the figures `classes`, `extremes` and `tokens` from the scores of one data source."""
  values = np.asarray(rows.get('bits_per_dim', rows['loss']), np.float64)
  return {
    'classes': _draw_classes(values, rows['label'], class_names, unit),
    'extremes': _draw_extremes(values, rows['index'], source, unit),
    'tokens': _draw_tokens(rows['tokens']),
  }


def draw_detections(detections: dict[str, Detection], names: tuple[str, str]) -> Picture:
  """Draws histograms of the scores of two datasets, with one panel per score."""
  labels = {
    'log_density': 'log₂ p(x), bits/image',
    'complexity_corrected': 'log₂ p(x) + PNG length, bits/image',
  }
  figure, axes = figures.plot(1, len(detections), size=(11, 3.6))
  for panel, (name, detection) in zip(axes[0], detections.items(), strict=True):
    scores = detection.scores, detection.ood_scores
    # Outliers would make the other values hard to see.
    low, high = _quantiles(np.concatenate(scores), 0.005)
    edges = np.linspace(low, high, 80)
    for values, label in zip(scores, names, strict=True):
      panel.hist(np.clip(values, low, high), edges, density=True, alpha=0.6, label=label)
    panel.set(title=f'AUROC {detection.auroc:.3f}', xlabel=labels[name], yticks=[])
    panel.legend()
  figure.suptitle('Out-of-distribution detection')
  return figures.to_array(figure)


def _draw_classes(
  values: Values, labels: Indices, class_names: Sequence[str], unit: str
) -> Picture:
  """Draws a histogram of all images, and of each class or the `_MAX_CLASSES` most extreme ones."""
  groups = {'all': values}
  if class_names:
    means = {c: np.nanmean(values[labels == c]) for c in np.unique(labels)}
    order = sorted(means, key=lambda c: means[c])
    if len(order) > _MAX_CLASSES:
      order = order[: _MAX_CLASSES // 2] + order[-_MAX_CLASSES // 2 :]
    groups |= {class_names[c]: values[labels == c] for c in order}
  low, high = _quantiles(values, 0.001)
  edges = np.linspace(low, high, 60)
  size = 6.5, 0.9 + 0.5 * len(groups)
  figure, axes = figures.plot(len(groups), 1, size=size, sharex=True)
  for panel, (name, group) in zip(axes[:, 0], groups.items(), strict=True):
    panel.hist(group, edges, color='C0' if name == 'all' else 'C1')
    panel.axvline(np.nanmean(group), color='black', linewidth=1)
    panel.set_ylabel(name, rotation=0, ha='right', va='center')
    panel.set_yticks([])
    panel.spines[['top', 'right', 'left']].set_visible(False)
  axes[-1, 0].set_xlabel(f'negative log-likelihood, {unit} (vertical line: mean)')
  return figures.to_array(figure)


def _draw_extremes(values: Values, indices: Indices, source: base.Source, unit: str) -> Picture:
  """Draws the images with the highest and with the lowest likelihoods."""
  order = np.argsort(values, kind='stable')  # nan last
  rows = _EXTREME_ROWS if len(order) >= 2 * _EXTREME_ROWS else 1
  count = rows * max(1, min(_EXTREME_COLUMNS, len(order) // (2 * rows)))
  ends = {'highest': order[:count], 'lowest': order[::-1][:count]}
  images = source.gather(indices[np.concatenate(list(ends.values()))])['image']
  names = []
  for name, selected in ends.items():
    low, high = np.sort(values[selected])[[0, -1]]
    names += [f'{name} likelihood', f'{low:.2f} to {high:.2f} {unit}'][:rows]
  return figures.sample_grid(images.reshape(2 * rows, -1, *images.shape[1:]), names)


def _draw_tokens(tokens: Float[np.ndarray, 'n N']) -> Picture:
  """Draws the mean negative log-likelihood of each token, as an image and along the sequence."""
  mean = np.nanmean(tokens, axis=0)
  low, high = np.nanquantile(tokens, (0.1, 0.9), axis=0)
  side = int(len(mean) ** 0.5)
  figure, axes = figures.plot(1, 2, size=(11, 4), width_ratios=(1, 1.8))
  left, right = axes[0]
  shown = left.imshow(mean.reshape(side, side), cmap='viridis')
  figure.colorbar(shown, ax=left, label='informative channels, nats/token')
  left.set(title='mean over images', xticks=[], yticks=[])
  position = np.arange(1, len(mean) + 1)
  right.fill_between(position, low, high, alpha=0.3, label='10 % to 90 % of images')
  right.plot(position, mean, label='mean')
  right.set(xlabel='token, raster order', ylabel='negative log-likelihood, nats')
  right.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, frameon=False)
  return figures.to_array(figure)


def _quantiles(values: Values, fraction: float) -> tuple[float, float]:
  """Returns the quantiles `fraction` and 1 - `fraction` of the finite values."""
  finite = values[np.isfinite(values)]
  return tuple(np.quantile(finite, (fraction, 1 - fraction))) if len(finite) else (0.0, 1.0)


def _select(rows: Rows, names: Sequence[str]) -> Rows:
  return {name: rows[name] for name in names if name in rows}


def _mean(values: np.ndarray) -> float | None:
  """Returns the exactly rounded mean, or None if a value is not finite (JSON has no nan)."""
  values = np.asarray(values, np.float64)
  return math.fsum(values) / len(values) if np.isfinite(values).all() else None


def _mean_and_error(values: np.ndarray) -> dict[str, float | None]:
  mean, count = _mean(values), len(values)
  if mean is None or count < 2:
    return {'mean': mean, 'standard_error': None}
  squares = math.fsum((np.asarray(values, np.float64) - mean) ** 2)
  return {'mean': mean, 'standard_error': math.sqrt(squares / (count - 1) / count)}
