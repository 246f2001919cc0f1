"""metrics.jsonl has each step once, also after crashes and on a full disk."""

import sys
import time

import pytest
from etils import epath

from farmer_jax.workdir import events, metrics
from tests.support import filesystems


@pytest.fixture(autouse=True)
def _no_tensorflow(monkeypatch):
  monkeypatch.setitem(sys.modules, 'clu', None)


def opened(workdir, step=0):
  """Returns a writer of a run that starts after `step`."""
  writer = metrics.MetricWriter(workdir)
  writer.rewind(step)
  return writer


def test_resume_drops_later_steps_and_truncated_lines(tmp_path):
  workdir = epath.Path(tmp_path)
  with opened(workdir) as writer:
    for step in (1, 2, 3):
      writer.write(step, 'train', {'loss': step})
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "spl')
  with opened(workdir, 2) as writer:
    writer.write(3, 'valid', {'loss': 30})
  assert [(r['step'], r['split'], r['loss']) for r in metrics.read(workdir)] == [
    (1, 'train', 1),
    (2, 'train', 2),
    (3, 'valid', 30),
  ]


def test_object_stores_get_all_lines_once_a_minute(tmp_path, monkeypatch):
  """An object store cannot append: each write replaces the object."""
  path = epath.Path(tmp_path) / 'metrics.jsonl'
  file = metrics._StoredFile(path, 'first\n')
  file.append('second\n')
  assert not path.exists()
  now = time.monotonic()
  monkeypatch.setattr(time, 'monotonic', lambda: now + 61)
  file.append('third\n')
  assert path.read_text() == 'first\nsecond\nthird\n'
  file.append('fourth\n')
  assert 'fourth' not in path.read_text()
  file.close()
  assert path.read_text().endswith('fourth\n')


def test_events_that_cannot_be_written_do_not_stop_training(tmp_path, monkeypatch, caplog):
  class FullDisk:
    def write_scalars(self, *unused):
      raise RuntimeError('Async error') from OSError(28, 'No space left on device')

  monkeypatch.setattr(events, '_clu_writer', lambda workdir: FullDisk())
  with opened(epath.Path(tmp_path)) as writer:
    for step in (1, 2):
      writer.write(step, 'train', {'loss': step})
  assert [record['step'] for record in metrics.read(tmp_path)] == [1, 2]
  assert caplog.text.count('No space left on device') == 1


@pytest.mark.faults
def test_full_disk_causes_one_warning_and_loses_no_line(tmp_path, caplog):
  workdir = tmp_path / 'run'
  with filesystems.small_disk(workdir, '64k'):
    with opened(epath.Path(workdir)) as writer:
      writer.write(1, 'train', {'loss': 1})
      filesystems.fill(workdir / 'filler')
      for step in range(2, 80):  # The last block has space for some lines.
        writer.write(step, 'train', {'loss': step})
      (workdir / 'filler').unlink()
      writer.write(80, 'train', {'loss': float('nan')})
    steps = [record['step'] for record in metrics.read(workdir)]
  assert steps == list(range(1, 81))
  assert caplog.text.count('No space left on device') == 1
