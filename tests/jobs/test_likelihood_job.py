"""The likelihood job on a trained run. tests/evaluation/test_likelihood.py tests scoring."""

import csv
import dataclasses
import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from farmer_jax import config
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


def start(run, *flags, devices=1, **changes):
  config_file = runs.write_config(with_likelihood(**changes), run / 'test_config.json')
  program = [sys.executable, '-m', 'tests.support.programs.likelihood_job', config_file, run]
  environment = processes.environment(devices)
  return subprocess.Popen([*program, *flags], stderr=subprocess.PIPE, env=environment, text=True)


def finish(process, code=0):
  _, err = process.communicate(timeout=300)
  assert process.returncode == code, err


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


@pytest.mark.faults
def test_scores_do_not_depend_on_devices_processes_or_batch_size(run, tmp_path):
  """One process has 1 or 8 devices. Two processes have 4 devices each."""
  results = []

  def score(devices, batch_size=50, num_processes=1):
    copy = shutil.copytree(run, tmp_path / f'copy{len(results)}')
    with socket.socket() as free:
      free.bind(('localhost', 0))
      address = f'--coordinator=localhost:{free.getsockname()[1]}'
    several = [[address, f'--process_id={process}'] for process in range(num_processes)]
    flags = several if num_processes > 1 else [[]]
    started = [start(copy, *each, devices=devices, batch_size=batch_size) for each in flags]
    for process in started:
      finish(process)
    results.append((read_report(copy), read_table(copy)))

  score(1)
  score(8)
  score(1, batch_size=7)
  score(4, num_processes=2)
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
  settings = dict(condition='marginal', draws=2, ood_source='synthetic')
  finish(start(run, '--shard_size=30', '--kill_at=100', **settings), code=-9)
  (rows,) = (run / 'likelihood' / 'rows').iterdir()
  assert len(list(rows.glob('*.npz'))) == 3  # 90 images
  assert not (run / 'likelihood' / f'{NAME}.json').exists()
  for workdir in (run, uninterrupted):
    finish(start(workdir, '--shard_size=30', **settings))
  for suffix in ('.json', '.csv', '-ood.csv'):
    files = [w / 'likelihood' / f'{NAME}{suffix}' for w in (run, uninterrupted)]
    assert files[0].read_bytes() == files[1].read_bytes(), suffix


MISTAKES = {
  'unknown split': ('split=test', 'likelihood.split'),
  'noise of a density model': ('noise_std=0.1', 'likelihood.noise_std'),
  'classes of other data': ('ood_source=synthetic', 'likelihood.condition'),
  'no draws': ('draws=0', 'likelihood.draws'),
  'missing folder': ('source=folder path=/nowhere', '/nowhere'),
}


@pytest.mark.parametrize('settings, name', MISTAKES.values(), ids=MISTAKES)
def test_mistakes_take_one_line_and_write_nothing(trained, settings, name, monkeypatch, capsys):
  files = sorted(trained.rglob('*'))
  flags = ['--job=likelihood', f'--workdir={trained}', f'--config=configs/from_run.py:{trained}']
  arguments = flags + [f'--config.likelihood.{setting}' for setting in settings.split()]
  outcome = command_line.run(arguments, monkeypatch, capsys, likelihood.run)
  (line,) = [row for row in outcome.err.splitlines() if row.startswith('error: ')]
  assert outcome.code == 1 and name in line and 'Traceback' not in outcome.err
  assert sorted(trained.rglob('*')) == files
