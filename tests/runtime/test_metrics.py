"""metrics.jsonl holds each step once, whatever happened in between."""

import json

from etils import epath

from farmer_jax.runtime import metrics


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
