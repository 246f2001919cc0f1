"""The command line: flags, overrides, help and errors."""

import json
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
from absl import flags

import farmer_jax.main
from farmer_jax import config, errors
from tests.support import command_line

QUICKSTART = '--config=configs/quickstart.py'


@pytest.fixture(name='run')
def _run(monkeypatch, capsys):
  return lambda *arguments, job=None: command_line.run(list(arguments), monkeypatch, capsys, job)


def start(*arguments, stdout=subprocess.PIPE):
  """Runs Python in a new process."""
  how = dict(cwd=command_line.ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)
  return subprocess.run([sys.executable, *arguments], **how)


def test_overrides_reach_the_job_and_the_default_workdir_is_the_name_of_the_run(run):
  outcome = run(QUICKSTART, '--workdir=w', '--config.train.steps=7', '--config.data.path=p')
  assert outcome.code == 0, outcome.err
  ((built, workdir),) = outcome.jobs
  assert (workdir, built.train.steps, built.data.path) == ('w', 7, 'p')
  assert run(QUICKSTART).jobs[0][1] == 'runs/quickstart'
  assert run('--config=configs/in256.py:1.9b-p8').jobs[0][1] == 'runs/in256-1.9b-p8'


def test_configurations_have_names(run):
  expected = run(QUICKSTART).jobs
  assert run('--config=quickstart').jobs == run('--config', 'quickstart').jobs == expected
  assert run('--config=in256:1.9b-p8').jobs == run('--config=configs/in256.py:1.9b-p8').jobs
  files = {file.stem for file in (command_line.ROOT / 'configs').glob('*.py')} - {'__init__'}
  assert all(name in run('--config=unknown').err for name in files)


def test_none_resets_a_key_that_the_file_sets(run, tmp_path):
  file = tmp_path / 'config.py'
  file.write_text(
    'from configs import quickstart\n'
    'def get_config():\n'
    '  c = quickstart.get_config()\n'
    "  c.train.valid_examples, c.sampling.dtype = 100, 'float64'\n"
    '  return c\n'
  )
  resets = '--config.train.valid_examples=None', '--config.sampling.dtype=None'
  outcome = run(f'--config={file}', *resets)
  assert outcome.code == 0, outcome.err
  built = outcome.jobs[0][0]
  assert (built.train.valid_examples, built.sampling.dtype) == (None, None)
  assert run(f'--config={file}').jobs[0][0].train.valid_examples == 100
  outcome = run(QUICKSTART, '--config.train.steps=None')
  assert outcome.code == 1 and 'steps' in outcome.err


def test_config_help(run):
  outcome = run('--config_help')
  assert (outcome.code, outcome.out) == (0, config.describe() + '\n')
  read_end, write_end = os.pipe()
  os.close(read_end)  # `--config_help | head` closes the pipe early.
  assert start('-m', 'farmer_jax.main', '--config_help', stdout=write_end).stderr == ''
  os.close(write_end)


@pytest.mark.parametrize(
  'command',
  [('-m', 'farmer_jax.main'), ('-c', 'from farmer_jax.main import run; run()')],  # pip's script
  ids=['module', 'script'],
)
def test_help_describes_every_flag(command):
  ours = {flag.name for flag in flags.FLAGS.flags_by_module_dict()['farmer_jax.main']}
  assert {'config', 'config_help', 'debug', 'job', 'workdir'} <= ours
  text = start(*command, '--help').stdout
  assert text.startswith(farmer_jax.main.__doc__)
  for name in ours:
    assert re.search(rf'^  --(\[no\])?{name}: \S', text, re.MULTILINE)


@pytest.mark.parametrize(
  ('arguments', 'named'),
  [
    ([], '--config'),
    ([QUICKSTART, 'steps=3'], 'steps=3'),
    ([QUICKSTART, '--config.train.lr=1'], 'config.train.lr'),
    ([QUICKSTART, '--config.tran.steps=1'], 'config.tran.steps'),
    ([QUICKSTART, '--config.train.steps=many'], 'train.steps'),
    ([QUICKSTART, '--config.train.steps=0'], 'config.train.steps=0'),
    ([QUICKSTART, '--config.train.max_returns=1'], 'config.train.max_rollbacks'),
    ([QUICKSTART, '--config.noise.kind=pink'], 'config.noise.kind'),
    ([QUICKSTART, '--job=fly'], 'config.job'),
    ([QUICKSTART, '--wrkdir=x'], 'wrkdir'),
    (['--config=configs/nothing.py'], 'nothing.py'),
    (['--config=configs/in256.py:7b'], '1.1b-p16'),
    (['--config=configs/from_run.py:/nowhere'], '/nowhere'),
    (['--config=configs/from_run.py'], '--config=from_run:RUN'),
    ([QUICKSTART, QUICKSTART], '--config is given twice'),
    ([QUICKSTART, '--config', 'quickstart'], '--config is given twice'),
    (['--config'], '--config=quickstart'),
    (['--config=in265:1.9b-p8'], '--config=in256:1.9b-p8?'),
    (['--config=elsewhere/in256.py:1.9b-p8'], '--config=in256:1.9b-p8'),
    (['--config=docs/'], '--config=from_run:docs/'),
    ([f'--config={__file__.removesuffix(".py")}'], 'no such file'),
    ([f'--config={command_line.ROOT}/Makefile'], 'not a Python file'),
    ([QUICKSTART, '--config.name=None'], 'config.name cannot be None'),
    ([QUICKSTART, '--config.train.step=3'], 'Did you mean train.steps?'),
    ([f'--config=from_run:{command_line.ROOT}/checkpoints/3'], f'the workdir {command_line.ROOT}'),
  ],
)
def test_user_error_is_one_line(run, arguments, named):
  outcome = run(*arguments)
  command_line.assert_user_error(outcome)
  assert named in outcome.err


def test_debug_prints_the_traceback(run):
  outcome = run('--config=configs/in256.py:7b', '--debug')
  assert outcome.code == 1
  assert 'Traceback' in outcome.err and 'configs/in256.py", line' in outcome.err
  assert outcome.err.splitlines()[-1].startswith('error: ')


@pytest.mark.parametrize('error', errors.UserError.__subclasses__())
def test_user_error_of_a_job_is_one_line(run, error):
  outcome = run(QUICKSTART, job=mock.Mock(side_effect=error('change config.data.path')))
  assert (outcome.code, outcome.err) == (1, 'error: change config.data.path\n')


def test_bug_is_a_traceback(run):
  with pytest.raises(ZeroDivisionError):
    run(QUICKSTART, job=mock.Mock(side_effect=ZeroDivisionError))


@pytest.mark.parametrize('old_names', [False, True])
@pytest.mark.parametrize('from_run', ['configs/from_run.py', 'from_run'])
def test_from_run_reads_the_configuration_of_a_run(run, tmp_path, from_run, old_names):
  saved = config.Config(name='earlier', seed=3, train=config.Train(max_rollbacks=5))
  values = config.to_dict(saved)
  if old_names:
    values['train']['max_returns'] = values['train'].pop('max_rollbacks')
  (tmp_path / 'config.json').write_text(json.dumps(values))
  outcome = run(f'--config={from_run}:{tmp_path}')
  assert outcome.code == 0, outcome.err
  assert outcome.jobs[0] == (saved, str(tmp_path))  # not runs/earlier, which can be another run
  assert run(f'--config={from_run}:{tmp_path}', '--workdir=w').jobs[0][1] == 'w'
  assert run(QUICKSTART).jobs[0][1] == 'runs/quickstart'


def test_user_error_of_a_process_leaves_no_workdir(tmp_path):
  workdir = tmp_path / 'run'
  # With --verbosity=0, JAX logs while it initializes its devices; the handler must not use them.
  arguments = f'--workdir={workdir}', '--config.data.source=folder', '--verbosity=0'
  done = start('-m', 'farmer_jax.main', QUICKSTART, *arguments)
  (line,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert done.returncode == 1 and 'config.data.path' in line
  assert 'Traceback' not in done.stderr and not workdir.exists()


def test_configuration_does_not_import_jax():
  """Errors in flags are reported before JAX is imported."""
  code = (
    'import sys, farmer_jax, farmer_jax.config, farmer_jax.main;'
    'print({"jax", "flax", "tensorflow"} & set(sys.modules))'
  )
  assert start('-c', code).stdout == 'set()\n'


def test_package_exports():
  from farmer_jax import api

  assert farmer_jax.load is api.load and farmer_jax.Run is api.Run
  assert re.fullmatch(r'\d+\.\d+\.\d+', farmer_jax.__version__)
  with pytest.raises(AttributeError, match='lod'):
    _ = farmer_jax.lod
