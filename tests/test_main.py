"""The command line: a mistake gets one line and exit code 1, before anything is written."""

import json
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from farmer_jax import config, jobs, main

QUICK = '--config=configs/quickstart.py'


@pytest.fixture(name='call')
def _call(tmp_path, monkeypatch, capsys):
  """Runs the program in this process; returns exit code, standard output, standard error, runs."""
  calls = []
  monkeypatch.setattr(jobs, 'run', lambda *arguments: calls.append(arguments))
  root = pathlib.Path(__file__).parents[1]

  def call(*arguments):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, 'argv', ['main', *arguments])
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
      if name.startswith('config.'):  # made by an earlier call's overrides
        delattr(flags.FLAGS, name)
      else:
        flags.FLAGS[name].unparse()
    try:
      main.run()
      code = 0
    except SystemExit as exit_:
      code = exit_.code or 0
    out, err = capsys.readouterr()
    return code, out, err, calls

  return call


def test_overrides_reach_the_job(call):
  code, _, err, calls = call(QUICK, '--workdir=w', '--config.train.steps=7', '--config.data.path=p')
  assert code == 0, err
  ((built, workdir),) = calls
  assert workdir == 'w'
  assert built.train.steps == 7
  assert built.data.path == 'p'


def test_the_workdir_is_named_after_the_run(call):
  *_, calls = call(QUICK)
  assert calls[0][1] == 'runs/quickstart'
  *_, calls = call('--config=configs/in256.py:1.9b-p8')
  assert calls[1][1] == 'runs/in256-1.9b-p8'


def test_config_help_lists_the_keys(call):
  code, out, *_ = call('--config_help')
  assert code == 0
  assert '--config.train.batch_size=64' in out
  assert len(out.splitlines()) == 2 * len(list(config.leaves()))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'no --config given'),
    ([QUICK, 'steps=3'], "unexpected argument 'steps=3'"),
    ([QUICK, '--config.train.lr=1'], 'config.train.lr is not a setting'),
    ([QUICK, '--config.tran.steps=1'], 'config.tran.steps is not a setting'),
    ([QUICK, '--config.train.steps=many'], 'train.steps'),
    ([QUICK, '--config.train.steps=0'], 'config.train.steps=0 must be above 0'),
    ([QUICK, '--config.noise.kind=pink'], 'must be one of uniform, gaussian'),
    ([QUICK, '--job=fly'], 'config.job must be one of'),
    ([QUICK, '--wrkdir=x'], 'wrkdir'),
    (['--config=configs/nothing.py'], 'nothing.py'),
    (['--config=configs/in256.py:7b'], "no variant '7b'; it has 1.1b-p16"),
    (['--config=configs/from_run.py:/nowhere'], '/nowhere is not a run'),
    (['--config=configs/from_run.py'], 'name the run'),
  ],
)
def test_mistakes_get_one_line(call, arguments, message):
  code, out, err, calls = call(*arguments)
  assert code == 1
  assert message in err
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  assert not calls
  assert not out


def test_from_run_reads_what_the_run_was_made_with(call, tmp_path):
  made = config.Config(name='earlier', seed=3)
  (tmp_path / 'config.json').write_text(json.dumps(config.to_dict(made)))
  code, _, err, calls = call(f'--config=configs/from_run.py:{tmp_path}')
  assert code == 0, err
  assert calls[0][0] == made


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config.data.source=folder'], 'data.path'),
    (['--config.data.source=folder', '--config.data.path=/nowhere'], '/nowhere'),
  ],
)
def test_a_real_process_ends_with_one_line(tmp_path, arguments, message):
  workdir = tmp_path / 'run'
  command = [sys.executable, '-m', 'farmer_jax.main', QUICK, f'--workdir={workdir}', *arguments]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == 1
  lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1
  assert message in lines[0]
  assert 'Traceback' not in done.stderr
  assert not workdir.exists()
