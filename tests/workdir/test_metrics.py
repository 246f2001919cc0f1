"""metrics.jsonl has each step once, also after crashes and on a full disk."""

import sys

import pytest
from etils import epath

from farmer_jax.workdir import metrics
from tests.support import filesystems


@pytest.fixture(autouse=True)
def _no_tensorflow(monkeypatch):
  monkeypatch.setitem(sys.modules, 'clu', None)


def test_resume_drops_later_steps_and_truncated_lines(tmp_path):
  workdir = epath.Path(tmp_path)
  writer = metrics.MetricWriter(workdir, 0)
  for step in (1, 2, 3):
    writer.write(step, 'train', {'loss': step})
  writer.close()
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "spl')
  writer = metrics.MetricWriter(workdir, 2)
  writer.write(3, 'valid', {'loss': 30})
  writer.close()
  assert [(r['step'], r['split'], r['loss']) for r in metrics.read(workdir)] == [
    (1, 'train', 1),
    (2, 'train', 2),
    (3, 'valid', 30),
  ]


@pytest.mark.faults
def test_full_disk_causes_one_warning_and_loses_no_line(tmp_path, caplog):
  workdir = tmp_path / 'run'
  with filesystems.small_disk(workdir, '64k'):
    writer = metrics.MetricWriter(epath.Path(workdir), 0)
    writer.write(1, 'train', {'loss': 1})
    filesystems.fill(workdir / 'filler')
    for step in range(2, 80):  # The last block has space for some lines.
      writer.write(step, 'train', {'loss': step})
    (workdir / 'filler').unlink()
    writer.write(80, 'train', {'loss': float('nan')})
    writer.close()
    steps = [record['step'] for record in metrics.read(workdir)]
  assert steps == list(range(1, 81))
  assert caplog.text.count('No space left on device') == 1
