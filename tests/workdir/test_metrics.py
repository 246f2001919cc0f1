"""metrics.jsonl holds each step once, whatever happened in between."""

import contextlib
import json
import subprocess

import pytest
from etils import epath

from farmer_jax.workdir import metrics


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, '_tensorboard_writer', lambda workdir: None)
  workdir = epath.Path(tmp_path)
  writer = metrics.MetricWriter(workdir, 0)
  for step in (1, 2, 3):
    writer.write(step, 'train', {'loss': step})
  writer.close()
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "spl')  # the line that a kill cut short
  writer = metrics.MetricWriter(workdir, 2)
  writer.write(3, 'train', {'loss': 30})
  writer.close()
  assert [(r['step'], r['loss']) for r in metrics.read(workdir)] == [(1, 1), (2, 2), (3, 30)]


def test_without_tensorflow_the_log_remains(tmp_path, monkeypatch, capfd):
  monkeypatch.setitem(__import__('sys').modules, 'clu', None)
  writer = metrics.MetricWriter(epath.Path(tmp_path), 0)
  writer.write(1, 'valid', {'loss': 2})
  writer.close()
  assert 'only metrics.jsonl' in capfd.readouterr().err
  record = json.loads((tmp_path / 'metrics.jsonl').read_text())
  assert {k: record[k] for k in ('step', 'split', 'loss')} == {
    'step': 1,
    'split': 'valid',
    'loss': 2.0,
  }


def test_a_full_disk_ends_nothing(tmp_path, monkeypatch, capfd):
  """A file system of its own, which is full for a while."""
  monkeypatch.setattr(metrics, '_tensorboard_writer', lambda workdir: None)
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(tmp_path)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting needs root')
  try:
    writer = metrics.MetricWriter(epath.Path(tmp_path), 0)
    writer.write(1, 'train', {'loss': 1})
    with (tmp_path / 'filler').open('wb', buffering=0) as file, contextlib.suppress(OSError):
      while True:
        file.write(bytes(512))
    for step in range(2, 80):  # the last block has some room left
      writer.write(step, 'train', {'loss': step})
    (tmp_path / 'filler').unlink()
    writer.write(80, 'train', {'loss': float('nan')})
    writer.close()
    steps = [r['step'] for r in metrics.read(tmp_path)]
  finally:
    subprocess.run(['umount', str(tmp_path)], check=True)
  assert steps == list(range(1, 81))
  assert capfd.readouterr().err.count('No space left on device') == 1
