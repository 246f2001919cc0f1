"""Runs that continue to more steps: schedules, the record, refusals, and bit-exact resumption."""

import dataclasses
import functools
import json
import shutil
import time
from unittest import mock

import numpy as np
import pytest
from etils import epath

from farmer_jax import checkpoints, errors, noise
from farmer_jax import config as config_lib
from farmer_jax.jobs import compile as compile_job
from farmer_jax.jobs import pretrain, training_run
from farmer_jax.training import optimizer
from farmer_jax.training import start as start_lib
from farmer_jax.workdir import layout, lock
from tests.support import models, processes, runs
from tests.support.processes import STEPS

PEAK, FINAL, WARMUP = 0.4, 0.1, 3


def training(extensions, steps=30):
  o = config_lib.Optimizer(learning_rate=PEAK, final_learning_rate=FINAL, warmup_steps=WARMUP)
  return config_lib.Train(steps=steps, extensions=extensions, optimizer=o)


def from_the_start(count, steps):
  """The learning rate of a run of `steps` steps, in float64."""
  if count < WARMUP:
    return PEAK / WARMUP + (PEAK - PEAK / WARMUP) * count / WARMUP
  progress = min((count - WARMUP) / (steps - 1 - WARMUP), 1)
  return FINAL + (PEAK - FINAL) * (1 + np.cos(np.pi * progress)) / 2


def restarted(count, start, steps):
  return FINAL + (PEAK - FINAL) * (1 + np.cos(np.pi * (count - start) / (steps - 1 - start))) / 2


@pytest.mark.parametrize(
  ('extensions', 'expected'),
  [
    ('', lambda i: from_the_start(i, 30)),
    ('20:20:keep_final', lambda i: from_the_start(i, 20)),
    ('12:20:keep_final', lambda i: from_the_start(i, 20)),
    ('20:20:restretch', lambda i: from_the_start(i, 20 if i < 20 else 30)),
    ('12:20:restretch', lambda i: from_the_start(i, 20 if i < 12 else 30)),
    ('20:20:restart_cosine', lambda i: from_the_start(i, 20) if i < 20 else restarted(i, 20, 30)),
    (
      '8:10:restart_cosine,20:20:restretch,25:25:keep_final',
      lambda i: (
        from_the_start(i, 10) if i < 8 else restarted(i, 8, 20) if i < 20 else from_the_start(i, 25)
      ),
    ),
    ('29:29:restart_cosine', lambda i: from_the_start(i, 29) if i < 29 else PEAK),
  ],
)
def test_learning_rate_of_extended_runs(extensions, expected):
  rate = optimizer.learning_rate_schedule(training(extensions))
  found = [float(rate(count)) for count in range(30)]
  np.testing.assert_allclose(found, [expected(i) for i in range(30)], rtol=1e-5)


@pytest.mark.parametrize('kind', ['uniform', 'gaussian'])
@pytest.mark.parametrize(
  ('extensions', 'spans'),
  [
    ('20:20:keep_final', [(0, 20)]),
    ('20:20:restart_cosine', [(0, 20)]),
    ('12:20:restretch', [(0, 20), (12, 30)]),
    ('5:10:restretch,20:20:keep_final', [(0, 10), (5, 20)]),
    ('10:10:keep_final,20:20:restretch', [(0, 10), (20, 30)]),
  ],
)
def test_noise_of_extended_runs(kind, extensions, spans):
  settings = config_lib.Noise(kind, 0.5, 0.2, curriculum_std=0.5, curriculum_fraction=0.5)
  config = config_lib.Config(noise=settings, train=training(extensions))
  model, end = noise.for_training(config), 0.2 if kind == 'gaussian' else 0.0
  for step in range(30):
    steps = max((start, steps) for start, steps in spans if start <= step)[1]
    steps *= 1 if kind == 'gaussian' else 0.5
    expected = end + (0.5 - end) * (1 + np.cos(np.pi * min(step / (steps - 1), 1))) / 2
    np.testing.assert_allclose(model.training_std(step), expected, rtol=1e-5, atol=1e-6)


def tiny(**train):
  return runs.training_config(**dict(validate_every=0) | train)


@pytest.fixture(scope='module', name='finished')
def _finished(tmp_path_factory):
  """A finished run of four steps, which tests must not change."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  pretrain.run(tiny(steps=4), workdir)
  return workdir


@pytest.fixture(name='run')
def _run(finished, workdir):
  return shutil.copytree(finished, workdir)


def rates(workdir):
  """Returns the learning rate of each step."""
  return {
    r['step']: r['learning_rate'] for r in processes.records(workdir) if r['split'] == 'train'
  }


def history(workdir):
  return [json.loads(s) for s in (workdir / 'config_history.jsonl').read_text().splitlines()]


@pytest.mark.faults
def test_extended_run_resumes_bit_exactly_and_is_extended_again(finished, run, tmp_path):
  longer = tiny(steps=STEPS, extend='restart_cosine')
  expected = shutil.copytree(finished, tmp_path / 'expected')
  pretrain.run(longer, expected)
  with runs.interrupted_after(batches=7):
    pretrain.run(longer, run)
  pretrain.run(tiny(steps=STEPS), run)  # `extend` is needed only once.
  processes.assert_equal(expected, run)
  o, found = longer.train.optimizer, rates(run)
  assert found[4] < found[3] and sorted(found) == list(range(1, STEPS + 1))
  np.testing.assert_allclose(found[5], o.learning_rate, rtol=1e-6)
  np.testing.assert_allclose(found[STEPS], o.final_learning_rate, rtol=1e-6)

  pretrain.run(tiny(steps=10, extend='keep_final'), run)
  found = rates(run)
  np.testing.assert_allclose([found[9], found[10]], o.final_learning_rate, rtol=1e-6)
  saved = config_lib.from_config_dict(layout.read_config(run))
  assert saved.train.steps == 10
  assert saved.train.extensions == '4:4:restart_cosine,8:8:keep_final'
  first, second = history(run)
  assert first['step'] == 4 and first['changed'] == {
    'train.steps': [4, STEPS],
    'train.extensions': ['', '4:4:restart_cosine'],
  }
  assert second['step'] == 8 and second['changed']['train.steps'] == [8, 10]


@pytest.mark.faults
def test_interrupted_run_gets_the_schedule_of_more_steps(tmp_path):
  """From the checkpoint of step 4 on, the learning rates are those of a run of twelve steps."""
  interrupted, other = tmp_path / 'interrupted', tmp_path / 'other'
  with runs.interrupted_after(batches=5):
    pretrain.run(tiny(), interrupted)
  while checkpoints.newest_step(epath.Path(interrupted)) < 4:  # It is written asynchronously.
    time.sleep(0.05)
  pretrain.run(tiny(steps=12, extend='restretch'), interrupted)
  assert layout.read_config(interrupted)['train']['extensions'] == '4:8:restretch'
  expected = optimizer.learning_rate_schedule(tiny(steps=12).train)
  for step, rate in rates(interrupted).items():
    schedule = expected if step > 4 else optimizer.learning_rate_schedule(tiny().train)
    np.testing.assert_allclose(rate, schedule(step - 1), rtol=1e-6)
  # Its configuration has the whole schedule, so that a new run repeats it.
  config = config_lib.from_config_dict(layout.read_config(interrupted))
  pretrain.run(config, other)
  found, expected = processes.records(interrupted), processes.records(other)
  assert [r['loss'] for r in found] == [r['loss'] for r in expected]


def test_extension_of_a_run_that_trains_is_refused(run):
  before = (run / 'config.json').read_bytes()
  with lock.hold(epath.Path(run)), pytest.raises(errors.WorkdirError, match='is training'):
    pretrain.run(tiny(steps=6, extend='restart_cosine'), run)
  assert (run / 'config.json').read_bytes() == before
  assert not (run / 'config_history.jsonl').exists()


def test_refused_data_change_nothing(run):
  """The checks of the configuration, of the classes and of the images come before all writing."""
  record = json.loads((run / 'data.json').read_text())
  record['training']['content'] = [f'{text}x' for text in record['training']['content']]
  (run / 'data.json').write_text(json.dumps(record))
  before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
  with pytest.raises(errors.WorkdirError, match='training images are not those'):
    pretrain.run(tiny(steps=6, extend='keep_final'), run)
  lock_file = run / 'lock'
  after = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
  assert {**after, lock_file: b''} == {**before, lock_file: b''}


def test_extend_applies_once(run, finished, tmp_path):
  """The configuration of a run does not extend it, or a branch of it, again."""
  claim = functools.partial(layout.claim, path=run, step=4)
  claim(training_run.with_extensions(tiny(steps=6, extend='keep_final'), run))
  saved = config_lib.from_config_dict(layout.read_config(run))
  assert saved.train.extensions == '4:4:keep_final' and saved.train.extend == 'none'
  with pytest.raises(errors.WorkdirError, match='train.steps is 6 there and 8 here'):
    claim(training_run.with_extensions(models.replace(saved, train=dict(steps=8)), run))
  assert layout.open_run(tiny(steps=6, extend='keep_final'), run) == run  # The same command.

  def first(**changes):
    return training_run.with_extensions(models.replace(saved, **changes), tmp_path / 'new')

  assert first() == saved  # A new run can repeat both schedules.
  assert not first(job='distill').train.extensions
  with pytest.raises(errors.ConfigError, match=r'train\.extensions'):
    first(train=dict(steps=4))


def claimed(workdir, **train):
  """Claims the workdir as training does."""
  config = training_run.with_extensions(tiny(**train), workdir)
  return training_run.prepare_workdir(config, workdir)


def test_extend_without_more_steps_says_what_to_change(run, caplog):
  claimed(run, steps=4, extend='keep_final')
  (record,) = caplog.records
  assert 'has finished its 4 steps' in record.message
  assert 'larger --config.train.steps' in record.message and '\n' not in record.message
  caplog.clear()
  for kind in 'keep_final', 'keep_final':  # It is extended, and the command is started again.
    claimed(run, steps=6, extend=kind)
  assert not caplog.records
  claimed(run, steps=6, extend='restretch')
  assert 'already has 6 steps' in caplog.text


def test_extended_run_is_compiled_with_the_command_that_extended_it(run, monkeypatch):
  """The programs have its schedule. Compilation does not extend a run."""
  config = dataclasses.replace(tiny(steps=6, extend='keep_final'), job='compile')
  lower = mock.Mock(side_effect=InterruptedError)
  monkeypatch.setattr(compile_job, '_lower', lower)
  with pytest.raises(errors.WorkdirError, match='train.steps is 4 there and 6 here'):
    compile_job.run(config, run)
  claimed(run, steps=6, extend='keep_final')
  for command in config, models.replace(config, train=dict(extend='none')):
    with pytest.raises(InterruptedError):
      compile_job.run(command, run)
    assert lower.call_args[0][0].train.extensions == '4:4:keep_final'


@pytest.mark.faults
def test_run_without_a_checkpoint_starts_again(workdir):
  with runs.interrupted_after(batches=1):
    pretrain.run(tiny(steps=4), workdir)
  config = tiny(steps=5, extend='restart_cosine')
  pretrain.run(config, workdir)
  expected = optimizer.learning_rate_schedule(tiny(steps=5).train)
  np.testing.assert_allclose(rates(workdir)[1], expected(0), rtol=1e-6)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    (dict(steps=8), r'train\.steps is 4 there and 8 here.*--config\.train\.extend'),
    (dict(steps=3, extend='restretch'), r'train\.steps is 4 there and 3 here'),
    (dict(steps=8, extend='keep_final', ema_decay=0.5), r'train\.ema_decay is 0\.9 there'),
    (dict(extensions='4:4:keep_final', steps=4, extend='keep_final'), None),
  ],
)
def test_other_changes_are_refused(run, changes, named):
  before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
  config = tiny(**changes)
  if named is None:  # `extensions` on the command line is replaced by the record of the run.
    pretrain.run(config, run)
    assert not layout.read_config(run)['train']['extensions']
    return
  with pytest.raises(errors.WorkdirError, match=named) as caught:
    pretrain.run(config, run)
  assert '\n' not in str(caught.value)
  assert {p: p.read_bytes() for p in run.rglob('*') if p.is_file()} == before


def test_only_training_extends_a_run(run):
  """Another job has not recorded the extension."""
  config = tiny(steps=8, extend='restretch')
  for function in layout.claim, layout.open_run:
    with pytest.raises(errors.WorkdirError, match=r'train\.steps is 4'):
      function(config, run)
  with pytest.raises(errors.WorkdirError, match=r'train\.extensions'):
    layout.claim(models.replace(config, train=dict(extensions='3:4:restretch')), run, 4)


def test_run_that_starts_from_an_extended_run_has_its_own_schedule(finished, workdir):
  """Its configuration is that of its source, with changes."""
  config = tiny(steps=9, extensions='4:4:restart_cosine')
  config = dataclasses.replace(config, init_from=str(finished))
  names = layout.read_class_names(finished)
  start = start_lib.open_start(config, workdir, names)
  assert not training_run.with_extensions(config, workdir, start).train.extensions
  config = dataclasses.replace(config, init_from=None, branch_from=str(finished))
  start = start_lib.open_start(config, workdir, names)
  assert not training_run.with_extensions(config, workdir, start).train.extensions
  config = models.replace(config, train=dict(extend='keep_final'))
  for claimed in None, dataclasses.replace(config, job='compile'):  # `compile` can be first.
    if claimed:
      layout.claim(claimed, workdir)
    extended = training_run.with_extensions(config, workdir, start)
    assert extended.train.extensions == '4:4:keep_final'


@pytest.mark.slow
@pytest.mark.faults
def test_extended_run_of_two_processes_that_is_killed_ends_like_one_that_is_not(tmp_path):
  pair = dict(devices=1, processes=2)
  settings = f'train.steps={STEPS}', 'train.extend=restart_cosine', 'mesh.fsdp=2'
  short, expected, workdir = (tmp_path / name for name in ('short', 'expected', 'run'))
  processes.train(short, 'train.steps=4', 'mesh.fsdp=2', **pair).finish()
  for copy in expected, workdir:
    shutil.copytree(short, copy)
  processes.train(expected, *settings, **pair).finish()
  job = processes.train(workdir, *settings, **pair)
  job.wait_for(lambda: processes.records(workdir)[-1]['step'] >= 6)
  job.kill()
  processes.train(workdir, *settings, **pair).finish()
  processes.assert_equal(expected, workdir)
  assert len(history(workdir)) == 1
