"""Weights & Biases: what a run records offline, resumption, and failures."""

import dataclasses
import json
import sys
import time

import numpy as np
import pytest
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax import errors
from farmer_jax.distributed import preemption
from farmer_jax.jobs import pretrain
from farmer_jax.workdir import layout, metrics, tracker
from tests.support import models, processes, runs, wandb_files, wandb_server

wandb = pytest.importorskip('wandb')

CONFIG = dataclasses.replace(
  runs.CONFIG, tracker=config_lib.Tracker(kind='wandb', project='tests', tags='tiny, digits')
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))  # has no credentials
  for name in ('WANDB_API_KEY', 'WANDB_DIR', 'NETRC'):
    monkeypatch.delenv(name, raising=False)
  yield
  wandb.teardown()  # reads the environment again


@pytest.fixture(name='claimed')
def _claimed(tmp_path):
  return layout.claim(CONFIG, tmp_path / 'run')


def opened(workdir, step=0):
  """Returns a writer with a tracker, of a run that starts after `step`."""
  writer = metrics.MetricWriter(workdir)
  writer.add(tracker.WandbRun(CONFIG, workdir))
  writer.rewind(step)
  return writer


def recorded(workdir):
  wandb.teardown()  # waits until the process of wandb has written its files
  return wandb_files.read(workdir)


def only(records, kind):
  return [getattr(r, kind) for r in records if r.WhichOneof('record_type') == kind]


@pytest.mark.faults
def test_resumed_training_is_one_run(tmp_path):
  """The run ends after step 5 and resumes from step 4. Step 5 is logged again."""
  workdir = tmp_path / 'run'
  train = dict(steps=6, log_every=1, checkpoint_every=2, validate_every=3, sample_every=6)
  grid = dict(inverse='sequential', grid_rows=1, grid_columns=1)
  config = models.replace(CONFIG, train=train, sampling=grid)
  with runs.interrupted_after(batches=5):
    pretrain.run(config, workdir)
  pretrain.run(config, workdir)
  jobs = recorded(workdir)
  written = processes.records(workdir)
  losses = {record['step']: record['loss'] for record in written if record['split'] == 'train'}
  for records, steps, exit_code in zip(jobs, ([1, 2, 3, 4, 5], [5, 6]), (1, 0), strict=True):
    (run,), (metric,), (end,) = (only(records, kind) for kind in ('run', 'metric', 'exit'))
    assert run.run_id == json.loads((workdir / 'run.json').read_text())['id']
    assert (run.project, run.display_name, list(run.tags)) == ('tests', 'tiny', ['tiny', 'digits'])
    logged = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config_lib.to_dict(config).items() <= logged.items()
    assert (metric.glob_name, metric.step_metric) == ('*', 'step')
    rows = [row for row in wandb_files.history(records) if 'train/loss' in row]
    assert [row['step'] for row in rows] == steps and end.exit_code == exit_code
    assert [row['train/loss'] for row in rows] == [losses[step] for step in steps]
  first, last = map(wandb_files.history, jobs)
  names = {f'train/{name}' for name in written[0]} - {
    f'train/{n}' for n in ('step', 'split', 'time')
  }
  assert first[0].keys() == names | {'step'}
  assert [row['step'] for row in first + last if 'valid/loss' in row] == [3, 6]
  for name, file in ('samples', 'samples/6.png'), ('curves', 'figures/curves.png'):
    (row,) = [row for row in last if f'{name}._type' in row]
    path = next((workdir / 'wandb').glob(f'*/files/{row[f"{name}.path"]}'))
    assert row['step'] == 6
    np.testing.assert_array_equal(read_image(path), read_image(workdir / file))


def read_image(path):
  from PIL import Image

  return np.asarray(Image.open(path))


def test_gray_images_and_nan(claimed):
  image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
  with opened(claimed) as writer:
    writer.write(1, 'train', {'loss': float('nan')})
    writer.write_image(1, 'gray', image)
  (records,) = recorded(claimed)
  scalar, row = wandb_files.history(records)
  assert np.isnan(scalar['train/loss'])
  path = next((claimed / 'wandb').glob(f'*/files/{row["gray.path"]}'))
  np.testing.assert_array_equal(read_image(path), image[..., 0])


def test_rollback_stays_in_the_run(claimed):
  with opened(claimed) as writer:
    for step, loss in ((1, 1.0), (2, float('inf'))):
      writer.write(step, 'train', {'loss': loss})
    writer.rewind(1)
    writer.write(2, 'train', {'loss': 2.0})
  assert [(r['step'], r['loss']) for r in metrics.read(claimed)] == [(1, 1.0), (2, 2.0)]
  (records,) = recorded(claimed)
  rows = [(row['step'], row['train/loss']) for row in wandb_files.history(records)]
  assert rows == [(1, 1.0), (2, np.inf), (2, 2.0)]


def test_preempted_run_is_finished(claimed):
  with pytest.raises(preemption.Preempted), opened(claimed):
    raise preemption.Preempted
  (records,) = recorded(claimed)
  assert only(records, 'preempting') and only(records, 'exit')[0].exit_code == 75


def test_only_process_zero_writes(claimed, monkeypatch):
  monkeypatch.setattr('jax.process_index', lambda: 1)
  with metrics.MetricWriter(claimed) as writer:
    writer.rewind(0)
    writer.write(1, 'train', {'loss': 1})
  assert not (claimed / 'metrics.jsonl').exists()


def test_failing_tracker_does_not_stop_training(tmp_path, caplog):
  class Broken:
    name, calls = 'Broken service', 0

    def __getattr__(self, method):
      self.calls += 1
      raise ConnectionResetError('Connection lost')

  with metrics.MetricWriter(epath.Path(tmp_path)) as writer:
    writer.add(broken := Broken())
    writer.rewind(0)
    for step in (1, 2):
      writer.write(step, 'train', {'loss': step})
    writer.write_image(2, 'samples', np.zeros((2, 2, 3), np.uint8))
  assert [record['step'] for record in metrics.read(tmp_path)] == [1, 2]
  assert broken.calls == 1 and caplog.text.count('Broken service') == 1
  assert 'Connection lost' in caplog.text


@pytest.fixture(name='server')
def _server(monkeypatch):
  with wandb_server.running() as server:
    use_server(monkeypatch, server.url)
    yield server


def use_server(monkeypatch, url):
  monkeypatch.setenv('WANDB_MODE', 'online')
  monkeypatch.setenv('WANDB_BASE_URL', url)
  monkeypatch.setenv('WANDB_API_KEY', 'a' * 40)


def test_server_gets_repeated_steps(claimed, server):
  """The first job ends after step 3, and the second one resumes from step 1."""
  with opened(claimed) as writer:
    for step in (1, 2, 3):
      writer.write(step, 'train', {'loss': step})
  wandb.teardown()
  with pytest.raises(preemption.Preempted), opened(claimed, 1) as writer:
    for step in (2, 3, 4):
      writer.write(step, 'train', {'loss': step})
    raise preemption.Preempted
  wandb.teardown()
  logged = [row['step'] for row in server.rows]
  assert logged == [1, 2, 3, 2, 3, 4] and server.exit_codes == [0, preemption.EXIT_CODE]
  assert [row['_step'] for row in server.rows] == [0, 1, 2, 3, 4, 5]
  assert set(server.names) == {layout.run_id(claimed)}


def test_server_that_disappears_does_not_block_the_job(claimed, monkeypatch):
  monkeypatch.setattr(tracker, '_FINISH_SECONDS', 2.0)
  with wandb_server.running() as server:
    use_server(monkeypatch, server.url)
    writer = opened(claimed)
  start = time.monotonic()
  with writer:
    for step in (1, 2):
      writer.write(step, 'train', {'loss': step})
  wandb.teardown()
  assert time.monotonic() - start < 20
  assert [record['step'] for record in metrics.read(claimed)] == [1, 2]


def test_unreachable_service_records_offline(claimed, monkeypatch, caplog):
  use_server(monkeypatch, 'http://127.0.0.1:1')
  monkeypatch.setenv('WANDB_INIT_TIMEOUT', '1')
  with opened(claimed) as writer:
    writer.write(1, 'train', {'loss': 2})
  assert 'connection refused' in caplog.text and 'offline' in caplog.text
  assert wandb_files.history(recorded(claimed)[-1]) == [{'step': 1, 'train/loss': 2}]


def test_unreachable_service_leaves_other_runs_of_the_process(
  claimed, monkeypatch, caplog, tmp_path
):
  caplog.set_level('INFO', 'absl')
  use_server(monkeypatch, 'http://127.0.0.1:1')
  monkeypatch.setenv('WANDB_INIT_TIMEOUT', '1')
  (tmp_path / 'other').mkdir()
  other = wandb.init(mode='offline', dir=tmp_path / 'other', reinit='create_new')
  other.log({'before': 1})
  with opened(claimed) as writer:
    writer.write(1, 'train', {'loss': 2})
    other.log({'after': 2})
  other.finish()
  assert 'connection refused' in caplog.text
  assert f'wandb sync --id {layout.run_id(claimed)} {claimed}/wandb/offline-run-' in caplog.text
  assert wandb_files.history(recorded(claimed)[-1]) == [{'step': 1, 'train/loss': 2}]
  (records,) = wandb_files.read(tmp_path / 'other')
  assert wandb_files.history(records) == [{'before': 1}, {'after': 2}]


@pytest.mark.parametrize('missing', ['package', 'login'])
def test_unusable_tracker_is_a_user_error(claimed, monkeypatch, missing):
  if missing == 'package':
    monkeypatch.setitem(sys.modules, 'wandb', None)
  else:
    monkeypatch.setenv('WANDB_MODE', 'online')
  with pytest.raises(errors.ConfigError) as caught:
    tracker.WandbRun(CONFIG, claimed)
  message = str(caught.value)
  assert 'config.tracker.kind=none' in message and '\n' not in message
  assert {'package': 'pip install wandb', 'login': 'wandb login'}[missing] in message
