"""What the scores of many images come to. NumPy, float64: the sums are exact, in any order."""

import csv
import io
import math

import numpy as np
import PIL.Image
from sklearn import metrics

from farmer_jax.ops import bits

TERMS = ('nll_informative', 'nll_redundant', 'log_det', 'nll_class')


def summarise(rows, class_names=()):
  """Means and standard errors of the scores of a split.

  A value that is not finite makes means null; `nonfinite_images` names the images, and
  `mean_of_finite` is the mean of `loss` over the others.

  Args:
    rows: dict of arrays, an entry an image, as `likelihood.Scorer` gives them; `bits_per_dim` too
      where it has a meaning; `index` and `label`.
    class_names: of the labels; without them there are no figures by class.

  Returns:
    A dict for JSON.
  """
  values = {n: rows[n] for n in ('bits_per_dim', 'bits_per_dim_importance', 'loss') if n in rows}
  finite = np.isfinite(rows['loss'])
  summary = {
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
    by_class = {}
    for label in np.unique(rows['label']):
      chosen = rows['label'] == label
      means = {name: _mean(array[chosen]) for name, array in values.items()}
      by_class[class_names[label]] = {'count': int(chosen.sum()), **means}
    summary['classes'] = by_class
  return summary


def separation(rows, other, dims):
  """How well likelihoods tell one data set from another.

  Args:
    rows: scores of images of the model's data, as for `summarise`, with `png_bits`.
    other: the same of other data.
    dims: pixels and channels of an image.

  Returns:
    For each score its AUROC, the probability that an image of the model's data scores above one
    of the other data; and both sets of scores: {name: (auroc, scores, other scores)}. `log_density`
    is log p(x) in bits an image; `complexity_corrected` adds the length of the image as a PNG:
    what is simple is likely under any model (Serrà et al. 2020, arXiv 1909.11480).
  """

  def log_density(rows):
    return -np.asarray(rows.get('loss_importance', rows['loss']), np.float64) * dims / math.log(2)

  pairs = {'log_density': (log_density(rows), log_density(other))}
  pairs['complexity_corrected'] = tuple(log_density(r) + r['png_bits'] for r in (rows, other))
  truth = np.repeat([1, 0], [len(rows['loss']), len(other['loss'])])
  found = {}
  for name, scores in pairs.items():
    # What is not finite counts as the least likely.
    together = np.concatenate(scores)
    ranked = np.where(np.isfinite(together), together, -np.finfo(float).max)
    found[name] = (float(metrics.roc_auc_score(truth, ranked)), *scores)
  return found


def png_bits(image):  # uint8 [H, W, C]
  """The length of an image as an optimised PNG, bits."""
  stream = io.BytesIO()
  PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
    stream, 'png', optimize=True
  )
  return 8 * stream.tell()


def with_bits(rows):
  """The rows of uniformly dequantised images with their bits/dim, importance-weighted too if they
  are of several draws."""
  names = {'loss': 'bits_per_dim', 'loss_importance': 'bits_per_dim_importance'}
  named = {names[n]: array for n, array in rows.items() if n in names}
  return rows | {n: bits.bits_per_dim(np.asarray(a, np.float64)) for n, a in named.items()}


def to_csv(rows):
  """A text with one line an image and its figures; blocks of the flow have columns of their own."""
  columns = {n: rows[n] for n in ('index', 'label', 'predicted') if n in rows}
  figures = ('bits_per_dim', 'bits_per_dim_importance', 'loss', *TERMS)
  columns |= {n: rows[n] for n in figures if n in rows}
  columns |= {f'log_det_block_{t}': block for t, block in enumerate(rows['log_dets'].T)}
  columns |= {n: rows[n] for n in ('png_bits',) if n in rows}
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(columns)
  writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
  return text.getvalue()


def _mean(values):
  """The mean, rounded once; None where a value is not finite, for JSON has no name for that."""
  values = np.asarray(values, np.float64)
  return math.fsum(values) / len(values) if np.isfinite(values).all() else None


def _mean_and_error(values):
  """Mean and standard error."""
  mean, count = _mean(values), len(values)
  if mean is None or count < 2:
    return {'mean': mean, 'standard_error': None}
  squares = math.fsum((np.asarray(values, np.float64) - mean) ** 2)
  return {'mean': mean, 'standard_error': math.sqrt(squares / (count - 1) / count)}
