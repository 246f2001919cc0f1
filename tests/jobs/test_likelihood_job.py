"""The likelihood job on a real run: killed, on one and on eight devices, by two processes."""

import csv
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from farmer_jax import config
from farmer_jax.jobs import likelihood, pretrain
from tests.support.runs import CONFIG

NAME, OTHER = 'digits-valid', 'digits-valid-other'


def with_settings(**changes):
  return dataclasses.replace(
    CONFIG, likelihood=config.Likelihood(**(dict(batch_size=50, name=NAME) | changes))
  )


def report(run, name=NAME):
  return json.loads((run / 'likelihood' / f'{name}.json').read_text())


def table(run, name=NAME):
  with (run / 'likelihood' / f'{name}.csv').open() as file:
    return list(csv.DictReader(file))


def program(built, run, before=''):
  """A program that does the job in a process of its own."""
  return f"""
{before}
from farmer_jax import config
from farmer_jax.jobs import likelihood
likelihood.run(config.from_config_dict({config.to_dict(built)!r}), {str(run)!r})
"""


def do(built, run, before='', devices=1):
  environment = os.environ | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'JAX_PLATFORMS': 'cpu',
  }
  return subprocess.run(
    [sys.executable, '-c', program(built, run, before)], capture_output=True, env=environment
  )


def test_leaves_a_report_a_table_and_figures(run, capsys):
  likelihood.run(with_settings(name=None, draws=2, condition='marginal'), run)
  name = 'digits-valid-draws=2-condition=marginal'
  found, rows = report(run, name), table(run, name)
  assert found['count'] == len(rows) == 180 and found['checkpoint_step'] == 3
  bits = np.array([float(row['bits_per_dim']) for row in rows])
  np.testing.assert_allclose(found['bits_per_dim']['mean'], bits.mean(), rtol=1e-9)
  assert found['bits_per_dim_importance']['mean'] < found['bits_per_dim']['mean']
  right = np.mean([row['predicted'] == row['label'] for row in rows])
  assert found['accuracy'] == right
  assert list(found['classes']) == list('0123456789') and len(found['nll_by_token']) == 16
  assert found['unit'] == 'bits/dim' and 'code' in found['density']
  for kind in ('classes', 'extremes', 'tokens'):
    picture = Image.open(run / 'figures' / f'likelihood-{name}-{kind}.png')
    assert min(picture.size) > 100 and np.asarray(picture).std() > 10
  out = capsys.readouterr().out
  assert f'Likelihood (180 images): {bits.mean():.4f}' in out and 'Accuracy' in out


def test_devices_processes_and_batches_do_not_change_the_figures(run, tmp_path):
  """One process with one device, one with eight, two with four each, other batches."""
  found = {}
  for devices, batch_size in ((1, 50), (8, 50), (1, 7)):
    copy = tmp_path / f'{devices}-{batch_size}'
    shutil.copytree(run, copy)
    done = do(with_settings(batch_size=batch_size), copy, devices=devices)
    assert done.returncode == 0, done.stderr.decode()
    found[devices, batch_size] = report(copy), table(copy)
  copy = tmp_path / 'two'
  shutil.copytree(run, copy)
  _run_two_processes(copy)
  found['two'] = report(copy), table(copy)
  (first, rows), *others = found.values()
  for other, other_rows in others:
    for name in ('loss', 'bits_per_dim'):
      for figure, value in first[name].items():
        np.testing.assert_allclose(other[name][figure], value, rtol=1e-6)
    for row, other_row in zip(rows, other_rows, strict=True):
      assert row['index'] == other_row['index'] and row['label'] == other_row['label']
      np.testing.assert_allclose(float(row['loss']), float(other_row['loss']), rtol=2e-5)


def _run_two_processes(run):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  started = []
  for process in range(2):
    before = f'import jax; jax.distributed.initialize("localhost:{port}", 2, {process})'
    command = [sys.executable, '-c', program(with_settings(), run, before)]
    started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
  for process in started:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def test_a_killed_job_ends_in_the_same_report(run, tmp_path):
  """A real process, killed when what is on disk ends in the middle of a batch; the same bytes."""
  whole = tmp_path / 'whole'
  shutil.copytree(run, whole)
  built = with_settings(condition='marginal', draws=2, other_source='synthetic')
  shrink = 'from farmer_jax.runtime import shards; shards.SHARD_SIZE = 30\n'
  kill = """
import os, signal
append = shards.Shards.append
def killing(self, **arrays):
  append(self, **arrays)
  if len(self) >= 100:
    os.kill(os.getpid(), signal.SIGKILL)
shards.Shards.append = killing
"""
  killed = do(built, run, shrink + kill)
  assert killed.returncode == -9, killed.stderr.decode()
  (rows,) = (run / 'likelihood' / 'rows').iterdir()
  assert len(list(rows.glob('*.npz'))) == 3  # 90 images
  assert not (run / 'likelihood' / f'{NAME}.json').exists()
  for workdir in (run, whole):
    done = do(built, workdir, shrink)
    assert done.returncode == 0, done.stderr.decode()
  for suffix in ('.json', '.csv', '-other.csv'):
    parts = [(w / 'likelihood' / f'{NAME}{suffix}').read_bytes() for w in (run, whole)]
    assert parts[0] == parts[1], suffix
  auroc = report(run)['other']['auroc']
  assert set(auroc) == {'log_density', 'complexity_corrected'}
  losses = (
    np.array([float(r['bits_per_dim_importance']) for r in table(run, n)]) for n in (NAME, OTHER)
  )
  wins = np.sign(np.subtract.outer(*losses)).mean()
  np.testing.assert_allclose(auroc['log_density'], (1 - wins) / 2, atol=1e-6)
  assert (run / 'figures' / f'likelihood-{NAME}-other.png').exists()


def test_other_images_or_weights_are_scored_anew(run, tmp_path):
  """The same number of images at the same path, and a checkpoint of the same step."""
  rng, folder, tables = np.random.default_rng(0), tmp_path / 'images', []
  folder.mkdir()
  built = with_settings(condition='none', source='folder', path=str(folder), examples=4)
  for _ in range(2):
    for number in range(40):
      image = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
      image.save(folder / f'{number}.png')
    likelihood.run(built, run)
    tables.append(table(run))
  other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=32))
  pretrain.run(other, tmp_path / 'other')
  shutil.rmtree(run / 'checkpoints')
  shutil.copytree(tmp_path / 'other' / 'checkpoints', run / 'checkpoints')
  likelihood.run(built, run)
  tables.append(table(run))
  losses = [[row['loss'] for row in rows] for rows in tables]
  assert losses[0] != losses[1] != losses[2]


def test_more_images_later_are_added(run, capsys):
  likelihood.run(with_settings(examples=60), run)
  few = table(run)
  capsys.readouterr()
  likelihood.run(with_settings(), run)
  assert table(run)[:60] == few and len(table(run)) == 180


def test_gaussian_noise_is_named_and_has_no_bits(tmp_path, capsys):
  noisy = dataclasses.replace(CONFIG, noise=config.Noise(kind='gaussian'))
  pretrain.run(noisy, tmp_path / 'run')
  for std in (None, 0.3):
    built = dataclasses.replace(noisy, likelihood=config.Likelihood(noise_std=std, name=f'{std}'))
    likelihood.run(built, tmp_path / 'run')
  fine, coarse = (report(tmp_path / 'run', name) for name in ('None', '0.3'))
  assert fine['unit'] == 'nats/dim at σ = 0.005' and coarse['unit'] == 'nats/dim at σ = 0.3'
  assert coarse['loss']['mean'] > fine['loss']['mean']
  for found in (fine, coarse):
    assert not any('bits' in name for name in found)
  assert 'bits' not in capsys.readouterr().out.partition('Likelihood')[2]


def test_bfloat16_says_what_it_changes(run, capsys):
  likelihood.run(with_settings(dtype='bfloat16'), run)
  change = report(run)['change_by_dtype']
  assert change['images'] == 50 and 0 < change['largest_nats_per_dim'] < 0.1
  assert 'bfloat16 moved' in capsys.readouterr().out


def test_a_non_finite_image_is_named(run, monkeypatch, capsys):
  original = likelihood.likelihood.Scorer.__call__

  def broken(self, params, images, labels, indices):
    found = original(self, params, images, labels, indices)
    bad = (indices == 17) | (indices == 90)
    return found | {'loss': jax.numpy.where(bad, np.nan, found['loss'])}

  monkeypatch.setattr(likelihood.likelihood.Scorer, '__call__', broken)
  likelihood.run(with_settings(), run)
  assert report(run)['nonfinite_images'] == [17, 90]
  assert report(run)['loss']['mean'] is None and report(run)['mean_of_finite'] is not None
  assert 'Not finite: 2 images, numbers 17, 90' in capsys.readouterr().out


WRONG = {
  'an unknown split': ('--config.likelihood.split=test', 'must be one of train, valid'),
  'noise of a density model': ('--config.likelihood.noise_std=0.1', 'uniform dequantisation'),
  'classes of other data': ('--config.likelihood.other_source=synthetic', 'none or marginal'),
  'no draws': ('--config.likelihood.draws=0', 'must be above 0'),
  'a folder that is not there': (
    '--config.likelihood.source=folder --config.likelihood.path=/nowhere',
    '/nowhere',
  ),
}


@pytest.mark.parametrize('overrides, message', WRONG.values(), ids=WRONG)
def test_mistakes_get_one_line(trained, overrides, message):
  files = sorted(trained.rglob('*'))
  command = [sys.executable, '-m', 'farmer_jax.main', '--job=likelihood', f'--workdir={trained}']
  command += [f'--config=configs/from_run.py:{trained}', *overrides.split()]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 1
  (line,) = [row for row in done.stderr.splitlines() if row.startswith('error: ')]
  assert message in line and 'Traceback' not in done.stderr
  assert sorted(trained.rglob('*')) == files
