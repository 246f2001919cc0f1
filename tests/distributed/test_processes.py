"""Two real processes train together: killed, resumed, and evaluated and resumed by one."""

import json
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest

from tests.support import processes

STEPS = processes.STEPS


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The run on one device of one process."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  processes.finish(processes.train(workdir, devices=1), workdir)
  return workdir


def test_two_processes_are_killed_and_go_on_and_one_evaluates(whole, tmp_path):
  """Two processes of two devices each, parameters split over all: SIGKILL for both once there is a
  checkpoint; the same again; then one process alone scores the images."""
  workdir = tmp_path / 'run'
  started = processes.train(workdir, 'mesh.fsdp=4', processes=2)
  deadline = time.monotonic() + 300
  while not any((workdir / 'checkpoints').glob('[0-9]')) and time.monotonic() < deadline:
    assert all(process.poll() is None for process in started), pathlib.Path(
      f'{workdir}-0.log'
    ).read_text()[-3000:]
    time.sleep(0.05)
  for process in started:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not (workdir / 'checkpoints' / str(STEPS)).exists(), 'killed too late to show anything'
  processes.finish(processes.train(workdir, 'mesh.fsdp=4', processes=2), workdir)
  first, second = (pathlib.Path(f'{workdir}-{n}.log').read_text() for n in range(2))
  assert 'Going on from step' in first and 'Held-out likelihood' in first
  assert 'Held-out' not in second and 'step' not in second
  processes.assert_alike(whole, workdir)
  scored = ['--job=likelihood', f'--config=configs/from_run.py:{workdir}']
  processes.finish(processes.start(workdir, *scored), workdir)
  report = json.loads((workdir / 'likelihood' / 'digits-valid.json').read_text())
  last = [r for r in processes.records(workdir) if r['split'] == 'valid'][-1]
  assert report['count'] == 180
  np.testing.assert_allclose(report['bits_per_dim']['mean'], last['bits_per_dim'], rtol=1e-5)


def test_two_processes_draw_and_one_judges(whole, tmp_path):
  """Fewer samples than a file holds: one process has nothing to draw."""
  workdir = tmp_path / 'run'
  shutil.copytree(whole, workdir)
  arguments = ['--job=fidelity', f'--config=configs/from_run.py:{workdir}']
  arguments += ['--config.fidelity.count=40', '--config.sampling.inverse=sequential']
  arguments += ['--config.fidelity.split=valid', '--config.fidelity.name=found']
  before = 'from farmer_jax.evaluation import classifier; classifier._STEPS = 20'
  processes.finish(processes.start(workdir, *arguments, processes=2, before=before), workdir)
  assert json.loads((workdir / 'fidelity' / 'found.json').read_text())['count'] == 40


def test_two_processes_divide_the_samples(whole, tmp_path):
  """A file of a thousand each; the images are those that one process draws."""
  drawn = []
  for count in (1, 2):
    workdir = tmp_path / f'by-{count}'
    shutil.copytree(whole, workdir)
    settings = ['count=1200', 'inverse=sequential', 'batch_size=200']
    arguments = ['--job=sample', f'--config=configs/from_run.py:{workdir}']
    arguments += [f'--config.sampling.{s}' for s in settings]
    processes.finish(processes.start(workdir, *arguments, processes=count), workdir)
    (folder,) = (p for p in (workdir / 'samples').iterdir() if p.is_dir())
    files = [np.load(file) for file in sorted(folder.glob('*.npz'))]
    assert [len(file['arr_0']) for file in files] == [1000, 200]
    drawn.append(np.concatenate([file['arr_0'] for file in files]).astype(int))
    assert json.loads((folder / 'samples.json').read_text())['count'] == 1200
  difference = abs(drawn[0] - drawn[1])
  assert difference.max() <= 1 and (difference > 0).mean() < 0.01
  assert len(np.unique(drawn[0], axis=0)) == 1200


@pytest.mark.parametrize(
  'first, second',
  [
    pytest.param(dict(devices=8), dict(devices=2), id='8 devices, then 2'),
    pytest.param(
      dict(processes=2), dict(devices=1), id='2 processes, then 1', marks=pytest.mark.slow
    ),
  ],
)
def test_a_run_goes_on_with_other_devices(whole, tmp_path, first, second):
  """Stopped by having no more steps to do, after half of them; the data go on in order."""
  workdir = tmp_path / 'run'
  processes.finish(processes.train(workdir, 'mesh.fsdp=2', **first), workdir)
  for step in (STEPS, STEPS - 2):
    shutil.rmtree(workdir / 'checkpoints' / str(step), ignore_errors=True)
  assert any((workdir / 'checkpoints').iterdir()) or pytest.fail('no checkpoint is left')
  processes.finish(processes.train(workdir, **second), workdir)
  log = pathlib.Path(f'{workdir}-0.log').read_text()
  assert f'Going on from step {STEPS - 4}' in log
  processes.assert_alike(whole, workdir)


def test_mistakes_get_one_line(tmp_path):
  for arguments, message in (
    (['--process_id=0'], 'give all three'),
    (['--coordinator=localhost:1', '--num_processes=2', '--process_id=2'], 'from 0 to 1'),
    (['--config.mesh.data=3'], 'do not multiply to the 2 devices'),
    (['--config.train.batch_size=7'], 'batch_size=7 cannot be divided among the 2 devices'),
    (['--config.mesh.embed=depth'], 'must be of data, fsdp, tensor'),
  ):
    workdir = tmp_path / 'none'
    (process,) = processes.start(workdir, '--config=configs/quickstart.py', *arguments)
    assert process.wait(timeout=120) == 1
    lines = pathlib.Path(f'{workdir}-0.log').read_text()
    assert message in lines and 'Traceback' not in lines
    assert not workdir.exists()
    pathlib.Path(f'{workdir}-0.log').unlink()
