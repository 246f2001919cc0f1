"""Summaries of scores, compared with SciPy and direct counts."""

import csv
import io
import json

import numpy as np
import PIL.Image
import pytest
from scipy import stats

from farmer_jax.evaluation import likelihood_summary

RNG = np.random.default_rng(0)


def make_rows(count=200, **changes):
  terms = {name: RNG.normal(size=count) for name in ('nll_informative', 'nll_redundant', 'log_det')}
  rows = {
    'index': np.arange(count),
    'label': RNG.integers(0, 3, count),
    'loss': sum(terms.values()),
    'log_dets': RNG.normal(size=(count, 2)),
    'tokens': RNG.normal(size=(count, 4)),
    'png_bits': RNG.integers(800, 1200, count),
  }
  return rows | terms | changes


def test_means_and_standard_errors():
  rows = make_rows(predicted=RNG.integers(0, 3, 200))
  summary = likelihood_summary.summarize(rows, ('a', 'b', 'c'))
  assert summary['count'] == 200 and summary['nonfinite_images'] == []
  np.testing.assert_allclose(summary['loss']['mean'], rows['loss'].mean(), rtol=1e-12)
  np.testing.assert_allclose(summary['loss']['standard_error'], stats.sem(rows['loss']), rtol=1e-12)
  np.testing.assert_allclose(summary['log_det_by_block'], rows['log_dets'].mean(0), rtol=1e-10)
  assert summary['accuracy'] == (rows['predicted'] == rows['label']).mean()
  for label, name in enumerate('abc'):
    loss = rows['loss'][rows['label'] == label]
    assert summary['classes'][name]['count'] == len(loss)
    np.testing.assert_allclose(summary['classes'][name]['loss'], loss.mean(), rtol=1e-10)
  total = sum(summary[name] for name in ('nll_informative', 'nll_redundant', 'log_det'))
  np.testing.assert_allclose(total, summary['loss']['mean'], rtol=1e-10)
  json.dumps(summary)


def test_sums_do_not_depend_on_the_order():
  rows = make_rows(loss=(10.0 ** RNG.uniform(-12, 12, 200)).astype(np.float32))
  reverse = {name: array[::-1] for name, array in rows.items()}
  summaries = [likelihood_summary.summarize(r)['loss'] for r in (rows, reverse)]
  assert summaries[0] == summaries[1]


def test_nonfinite_values_are_listed_and_not_dropped():
  rows = make_rows()
  rows['loss'][[3, 77]] = np.nan, np.inf
  summary = likelihood_summary.summarize(rows, ('a', 'b', 'c'))
  assert summary['nonfinite_images'] == [3, 77]
  assert summary['loss'] == {'mean': None, 'standard_error': None}
  finite = np.delete(rows['loss'], [3, 77])
  np.testing.assert_allclose(summary['mean_of_finite'], finite.mean(), rtol=1e-12)
  assert 'NaN' not in json.dumps(summary)


def test_auroc_equals_count_of_pairs():
  rows, ood_rows = make_rows(60), make_rows(50)
  detections = likelihood_summary.detect_ood(rows, ood_rows, dims=64)
  for name, (auroc, scores, ood_scores) in detections.items():
    pairs = np.sign(scores[:, None] - ood_scores[None])
    np.testing.assert_allclose(auroc, (pairs.mean() + 1) / 2, rtol=1e-12, err_msg=name)
  log_density, corrected = (detections[n].scores for n in ('log_density', 'complexity_corrected'))
  np.testing.assert_allclose(log_density, -rows['loss'] * 64 / np.log(2), rtol=1e-12)
  np.testing.assert_allclose(corrected - log_density, rows['png_bits'], rtol=1e-9)


def test_nonfinite_scores_rank_lowest():
  rows = make_rows(30)
  for value in (np.nan, -np.inf, np.inf):
    ood_rows = make_rows(30, loss=np.full(30, value))
    detections = likelihood_summary.detect_ood(rows, ood_rows, 64)
    assert detections['log_density'].auroc == 1.0
    for one in (detections, likelihood_summary.detect_ood(ood_rows, ood_rows, 64)):
      assert likelihood_summary.draw_detections(one, ('a', 'b')).ndim == 3


@pytest.mark.parametrize('channels', [1, 3])
def test_png_length(channels):
  noise = RNG.integers(0, 256, (32, 32, channels), np.uint8)
  stream = io.BytesIO()
  PIL.Image.fromarray(noise.squeeze()).save(stream, 'png')
  length, flat = likelihood_summary.png_bits(noise), likelihood_summary.png_bits(0 * noise)
  assert abs(length / (8 * len(stream.getvalue())) - 1) < 0.05
  assert length > 8 * noise.size > 5 * flat


def test_csv_has_one_line_for_each_image():
  rows = likelihood_summary.with_bits(make_rows(5, loss_importance=np.zeros(5)))
  table = list(csv.DictReader(io.StringIO(likelihood_summary.to_csv(rows))))
  assert len(table) == 5 and {'log_det_block_1', 'bits_per_dim_importance'} <= set(table[0])
  for line, loss, label in zip(table, rows['loss'], rows['label'], strict=True):
    assert float(line['loss']) == loss and int(line['label']) == label
    np.testing.assert_allclose(float(line['bits_per_dim']), loss / np.log(2) + 7)
