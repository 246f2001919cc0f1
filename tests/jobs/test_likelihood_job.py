"""The likelihood job on a trained run. tests/evaluation/test_likelihood.py tests scoring."""

import csv
import dataclasses
import json
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from farmer_jax import config, jobs
from farmer_jax.jobs import likelihood
from tests.support import command_line, processes, runs

NAME = 'digits-valid'


def with_likelihood(**changes):
  settings = dict(batch_size=50, name=NAME) | changes
  return dataclasses.replace(runs.CONFIG, likelihood=config.Likelihood(**settings))


def read_report(run, name=NAME):
  return json.loads((run / 'likelihood' / f'{name}.json').read_text())


def read_table(run, name=NAME):
  with (run / 'likelihood' / f'{name}.csv').open() as file:
    return list(csv.DictReader(file))


def start(run, batch_size=50, settings=(), **how):
  settings = [f'name={NAME}', f'batch_size={batch_size}', *settings]
  overrides = [f'likelihood.{setting}' for setting in settings]
  return processes.start_job('likelihood', run, *overrides, **how)


def test_job_writes_report_table_and_figures(run, capsys):
  settings = dict(name=None, draws=2, condition='marginal', ood_source='synthetic', examples=60)
  likelihood.run(with_likelihood(**settings), run)
  name = 'digits-valid-examples=60-draws=2-condition=marginal-ood_source=synthetic'
  report, rows = read_report(run, name), read_table(run, name)
  assert report['count'] == len(rows) == 60 and report['checkpoint_step'] == 3
  bits = np.array([float(row['bits_per_dim']) for row in rows])
  np.testing.assert_allclose(report['bits_per_dim']['mean'], bits.mean(), rtol=1e-9)
  assert report['bits_per_dim_importance']['mean'] < report['bits_per_dim']['mean']
  assert report['accuracy'] == np.mean([row['predicted'] == row['label'] for row in rows])
  assert list(report['classes']) == list('0123456789') and len(report['nll_by_token']) == 16
  assert report['unit'] == 'bits/dim'
  for kind in ('classes', 'extremes', 'tokens', 'ood'):
    picture = Image.open(run / 'figures' / f'likelihood-{name}-{kind}.png')
    assert min(picture.size) > 100 and np.asarray(picture).std() > 10
  auroc = report['ood']['auroc']
  assert set(auroc) == {'log_density', 'complexity_corrected'}
  bound, ood_bound = (
    np.array([float(row['bits_per_dim_importance']) for row in table])
    for table in (rows, read_table(run, f'{name}-ood'))
  )
  wins = np.sign(np.subtract.outer(bound, ood_bound)).mean()
  np.testing.assert_allclose(auroc['log_density'], (1 - wins) / 2, atol=1e-6)
  out = capsys.readouterr().out
  assert f'{bits.mean():.4f}' in out and f'{report["accuracy"]:.4f}' in out


def test_other_data_have_other_names(run):
  """The name of the results of the run's own data does not contain a path."""
  job = dict(name=None, examples=20)
  other = dataclasses.replace(runs.CONFIG.data, path='/other/data')
  for built in with_likelihood(**job), dataclasses.replace(with_likelihood(**job), data=other):
    likelihood.run(built, run)
  names = sorted(file.stem for file in (run / 'likelihood').glob('*.json'))
  assert len(names) == 2 and names[1] == 'digits-valid-examples=20', names
  assert names[0].startswith('digits-valid-data.path=_other_data-examples=20')


@pytest.mark.faults
def test_scores_do_not_depend_on_devices_processes_or_batch_size(run, tmp_path):
  """One process has 1 or 8 devices. Two processes have 4 devices each."""
  results = []

  for changes in (
    dict(devices=1),
    dict(devices=8),
    dict(devices=1, batch_size=7),
    dict(devices=4, processes=2),
  ):
    copy = shutil.copytree(run, tmp_path / f'copy{len(results)}')
    start(copy, **changes).finish()
    results.append((read_report(copy), read_table(copy)))
  (expected, expected_rows), *others = results
  for report, rows in others:
    for name in ('loss', 'bits_per_dim'):
      for statistic, value in expected[name].items():
        np.testing.assert_allclose(report[name][statistic], value, rtol=1e-6)
    for row, expected_row in zip(rows, expected_rows, strict=True):
      assert row['index'] == expected_row['index'] and row['label'] == expected_row['label']
      np.testing.assert_allclose(float(row['loss']), float(expected_row['loss']), rtol=2e-5)


@pytest.mark.faults
def test_report_after_sigkill_is_bit_exact(run, tmp_path):
  """The process is killed when the scores on disk end in the middle of a batch."""
  uninterrupted = shutil.copytree(run, tmp_path / 'uninterrupted')
  settings = ['condition=marginal', 'draws=2', 'ood_source=synthetic']
  how = dict(settings=settings, devices=1)
  killed = start(run, fault=('small_shards', 30, 30, 100), **how)
  assert killed.codes() == [-signal.SIGKILL], killed.log()
  (rows,) = (run / 'likelihood' / 'rows').iterdir()
  assert len(list(rows.glob('*.npz'))) == 3  # 90 images
  assert not (run / 'likelihood' / f'{NAME}.json').exists()
  for workdir in (run, uninterrupted):
    start(workdir, fault=('small_shards', 30, 30), **how).finish()
  for suffix in ('.json', '.csv', '-ood.csv'):
    files = [w / 'likelihood' / f'{NAME}{suffix}' for w in (run, uninterrupted)]
    assert files[0].read_bytes() == files[1].read_bytes(), suffix


MISTAKES = {
  'unknown split': ('likelihood.split=test', 'likelihood.split'),
  'noise of a density model': ('likelihood.noise_std=0.1', 'likelihood.noise_std'),
  'classes of other data': ('likelihood.ood_source=synthetic', 'likelihood.condition'),
  'no draws': ('likelihood.draws=0', 'likelihood.draws'),
  'missing folder': ('likelihood.source=folder likelihood.path=/nowhere', '/nowhere'),
  'unknown class': ('sampling.labels=dragon', 'config.sampling.labels.*dragon'),
}


@pytest.mark.parametrize('settings, named', MISTAKES.values(), ids=MISTAKES)
def test_mistakes_take_one_line_and_write_nothing(trained, settings, named, monkeypatch, capsys):
  files, job = sorted(trained.rglob('*')), 'sample' if 'sampling' in settings else 'likelihood'
  flags = [f'--job={job}', f'--workdir={trained}', f'--config=configs/from_run.py:{trained}']
  arguments = flags + [f'--config.{setting}' for setting in settings.split()]
  outcome = command_line.run(arguments, monkeypatch, capsys, jobs.run)
  (line,) = [row for row in outcome.err.splitlines() if row.startswith('error: ')]
  assert outcome.code == 1 and re.search(named, line) and 'Traceback' not in outcome.err
  assert sorted(trained.rglob('*')) == files
