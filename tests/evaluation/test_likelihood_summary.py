"""What scores come to: against SciPy and by counting pairs."""

import csv
import io
import json

import numpy as np
import PIL.Image
import pytest
from scipy import stats

from farmer_jax.evaluation import likelihood_figures, likelihood_summary

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
  found = likelihood_summary.summarise(rows, ('a', 'b', 'c'))
  assert found['count'] == 200 and found['nonfinite_images'] == []
  np.testing.assert_allclose(found['loss']['mean'], rows['loss'].mean(), rtol=1e-12)
  np.testing.assert_allclose(found['loss']['standard_error'], stats.sem(rows['loss']), rtol=1e-12)
  np.testing.assert_allclose(found['log_det_by_block'], rows['log_dets'].mean(0), rtol=1e-10)
  assert found['accuracy'] == (rows['predicted'] == rows['label']).mean()
  for label, name in enumerate('abc'):
    own = rows['loss'][rows['label'] == label]
    assert found['classes'][name]['count'] == len(own)
    np.testing.assert_allclose(found['classes'][name]['loss'], own.mean(), rtol=1e-10)
  parts = sum(found[name] for name in ('nll_informative', 'nll_redundant', 'log_det'))
  np.testing.assert_allclose(parts, found['loss']['mean'], rtol=1e-10)
  json.dumps(found)


def test_sums_do_not_depend_on_order():
  rows = make_rows(loss=(10.0 ** RNG.uniform(-12, 12, 200)).astype(np.float32))
  backwards = {name: array[::-1] for name, array in rows.items()}
  assert (
    likelihood_summary.summarise(rows)['loss'] == likelihood_summary.summarise(backwards)['loss']
  )


def test_what_is_not_finite_is_named_and_not_dropped():
  rows = make_rows()
  rows['loss'][[3, 77]] = np.nan, np.inf
  found = likelihood_summary.summarise(rows, ('a', 'b', 'c'))
  assert found['nonfinite_images'] == [3, 77]
  assert found['loss'] == {'mean': None, 'standard_error': None}
  finite = np.delete(rows['loss'], [3, 77])
  np.testing.assert_allclose(found['mean_of_finite'], finite.mean(), rtol=1e-12)
  assert 'NaN' not in json.dumps(found)


def test_separation_counts_pairs():
  rows, other = make_rows(60), make_rows(50)
  found = likelihood_summary.separation(rows, other, dims=64)
  for name, (auroc, scores, other_scores) in found.items():
    pairs = np.sign(scores[:, None] - other_scores[None])
    np.testing.assert_allclose(auroc, (pairs.mean() + 1) / 2, rtol=1e-12, err_msg=name)
  log_density, corrected = (found[n][1] for n in ('log_density', 'complexity_corrected'))
  np.testing.assert_allclose(log_density, -rows['loss'] * 64 / np.log(2), rtol=1e-12)
  np.testing.assert_allclose(corrected - log_density, rows['png_bits'], rtol=1e-9)


def test_separation_with_what_is_not_finite():
  rows, other = make_rows(30), make_rows(30)
  for value in (np.nan, -np.inf, np.inf):
    other['loss'][:] = value
    found = likelihood_summary.separation(rows, other, 64)
    assert found['log_density'][0] == 1.0
    assert likelihood_figures.separation(found, ('a', 'b')).ndim == 3
  rows['loss'][:] = np.nan
  found = likelihood_summary.separation(rows, other, 64)
  assert likelihood_figures.separation(found, ('a', 'b')).ndim == 3


@pytest.mark.parametrize('channels', [1, 3])
def test_png_length(channels):
  noise = RNG.integers(0, 256, (32, 32, channels), np.uint8)
  stream = io.BytesIO()
  PIL.Image.fromarray(noise.squeeze()).save(stream, 'png')
  assert abs(likelihood_summary.png_bits(noise) / (8 * len(stream.getvalue())) - 1) < 0.05
  assert (
    likelihood_summary.png_bits(noise)
    > 32 * 32 * channels * 8
    > likelihood_summary.png_bits(0 * noise) * 5
  )


def test_csv_has_a_row_an_image():
  rows = likelihood_summary.with_bits(make_rows(5, loss_importance=np.zeros(5)))
  table = list(csv.DictReader(io.StringIO(likelihood_summary.to_csv(rows))))
  assert len(table) == 5 and {'log_det_block_1', 'bits_per_dim_importance'} <= set(table[0])
  for line, loss, label in zip(table, rows['loss'], rows['label'], strict=True):
    assert float(line['loss']) == loss and int(line['label']) == label
    np.testing.assert_allclose(float(line['bits_per_dim']), loss / np.log(2) + 7)
