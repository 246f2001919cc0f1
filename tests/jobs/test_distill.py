"""Distillation of a tiny run: training, sampling, and checks of the teacher."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from farmer_jax import api, config, errors, sampling
from farmer_jax.jobs import distill, pretrain, sample
from farmer_jax.workdir import layout

TEACHER = config.Config(
  name='teacher',
  data=config.Data(source='digits', image_size=8),
  noise=config.Noise(kind='gaussian', std_start=0.3, std_end=0.1),
  model=config.Model(
    patch_size=2,
    flow=config.Flow(blocks=2, layers=1, width=32, head_dim=16),
    prior=config.Prior(layers=1, width=16, head_dim=8, condition_copies=2, components=3),
  ),
  train=config.Train(
    steps=60,
    batch_size=32,
    validate_every=0,
    sample_every=0,
    checkpoint_every=60,
    optimizer=config.Optimizer(learning_rate=1e-2, warmup_steps=10),
  ),
  sampling=config.Sampling(count=20, batch_size=8, denoise=True),
)


def student_config(teacher, **train):
  changes = dict(steps=600, validate_every=600, sample_every=600, checkpoint_every=200) | train
  return dataclasses.replace(
    TEACHER,
    job='distill',
    teacher=str(teacher),
    train=dataclasses.replace(TEACHER.train, **changes),
    distill=config.Distill(input_noise_std=0.05),
  )


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """The folder of a teacher's run and a student's run."""
  folder = tmp_path_factory.mktemp('runs')
  pretrain.run(TEACHER, folder / 'teacher')
  distill.run(student_config(folder / 'teacher'), folder / 'student')
  return folder


@pytest.fixture
def student(runs, tmp_path):
  """A copy of the student's run and of the teacher's run, which the test may change."""
  shutil.copytree(runs, tmp_path / 'runs')
  folder = tmp_path / 'runs' / 'student'
  settings = json.loads((folder / 'config.json').read_text())
  settings['teacher'] = str(tmp_path / 'runs' / 'teacher')
  (folder / 'config.json').write_text(json.dumps(settings))
  return folder


def configured(workdir, **changes):
  found = config.from_config_dict(layout.read_config(workdir))
  settings = dataclasses.replace(found.sampling, **changes)
  return dataclasses.replace(found, job='sample', sampling=settings)


def images(folder):
  (file,) = folder.glob('*.npz')
  return np.load(file)['arr_0'].astype(int)


def test_error_falls_by_a_factor_of_10(runs, tmp_path):
  records = [json.loads(line) for line in (runs / 'student' / 'metrics.jsonl').open()]
  final = records[-1]
  assert final['split'] == 'valid' and final['step'] == 600
  # A learning rate near 0 preserves the initial student, a copy of the teacher's flow.
  initial = student_config(runs / 'teacher', steps=1, validate_every=1, sample_every=0)
  slow = dataclasses.replace(
    initial.train.optimizer, learning_rate=1e-12, final_learning_rate=1e-12
  )
  initial = dataclasses.replace(initial, train=dataclasses.replace(initial.train, optimizer=slow))
  distill.run(initial, tmp_path / 'initial')
  first = [json.loads(line) for line in (tmp_path / 'initial' / 'metrics.jsonl').open()][-1]
  assert first['rmse'] > 0.05
  assert final['loss'] < first['loss'] / 10
  assert final['rmse'] ** 2 < first['rmse'] ** 2 / 10
  assert final['psnr'] == pytest.approx(20 * np.log10(2 / final['rmse']))


def test_pictures_and_record_of_the_teacher(runs):
  folder = runs / 'student'
  assert json.loads((folder / 'config.json').read_text())['teacher'] == str(runs / 'teacher')
  assert json.loads((folder / 'teacher.json').read_text())['step'] == 60
  for name in ('samples/600.png', 'figures/student.png', 'figures/curves.png'):
    assert Image.open(folder / name).size[0] > 100


def test_samples_of_the_student_are_close_to_exact_samples(student):
  for inverse, rounds in (('sequential', 0), ('student', 0), ('student', 20)):
    sample.run(configured(student, inverse=inverse, refinement_rounds=rounds), student)
  folder = student / 'samples'
  exact = images(folder / '600-inverse=sequential-denoise=True')
  near = images(folder / '600-inverse=student-denoise=True')
  refined = images(folder / '600-inverse=student-refinement_rounds=20-denoise=True')
  assert 0 < abs(near - exact).mean() < 10
  assert abs(refined - exact).max() <= 1
  report = json.loads((folder / '600-inverse=student-denoise=True' / 'samples.json').read_text())
  assert report['largest_residual'] is None and report['inverse']['speedup'] > 0
  assert report['inverse']['difference'] > 1e-4
  # The teacher draws the same exact images.
  teacher = student.parent / 'teacher'
  sample.run(configured(teacher, inverse='sequential'), teacher)
  np.testing.assert_array_equal(
    images(teacher / 'samples' / '60-inverse=sequential-denoise=True'), exact
  )


def test_refined_samples_report_their_residual(student):
  settings = configured(student, inverse='student', refinement_rounds=1)
  loaded = api.Run.open(student, settings)
  labels = np.arange(4)
  sampler = sampling.Sampler(loaded.model, settings)
  found = sampler(loaded.params, labels, labels)
  assert (found.residual > settings.sampling.tolerance).all() and (found.passes == 1).all()


def test_hidden_objective_and_generated_images(runs, tmp_path):
  settings = dataclasses.replace(
    student_config(runs / 'teacher', steps=3, validate_every=3, sample_every=0),
    distill=config.Distill(objective='hidden', generated_fraction=0.5),
  )
  distill.run(settings, tmp_path / 'hidden')
  sample.run(configured(tmp_path / 'hidden', inverse='student'), tmp_path / 'hidden')
  assert len(images(tmp_path / 'hidden' / 'samples' / '3-inverse=student-denoise=True')) == 20
  with pytest.raises(errors.ConfigError, match='refinement_rounds.*objective=outputs'):
    config.check(configured(tmp_path / 'hidden', inverse='student', refinement_rounds=1))


def test_resumed_student_uses_the_recorded_checkpoint_of_the_teacher(student, runs):
  """The teacher has a newer checkpoint. The student uses step 60 and ends with the same loss."""
  teacher = student.parent / 'teacher'
  shutil.copytree(teacher / 'checkpoints' / '60', teacher / 'checkpoints' / '70')
  reference = json.loads((runs / 'student' / 'metrics.jsonl').read_text().splitlines()[-1])
  for step in ('400', '600'):
    shutil.rmtree(student / 'checkpoints' / step, ignore_errors=True)
  shutil.copytree(runs / 'student' / 'checkpoints' / '400', student / 'checkpoints' / '400')
  settings = json.loads((student / 'config.json').read_text())
  distill.run(config.from_config_dict(settings), student)
  again = json.loads((student / 'metrics.jsonl').read_text().splitlines()[-1])
  assert again['step'] == 600 and again['loss'] == reference['loss']
  assert json.loads((student / 'teacher.json').read_text())['step'] == 60


def test_python_api_of_a_student(runs):
  sequential = {'sampling.inverse': 'sequential'}
  teacher = api.load(runs / 'teacher', overrides=sequential)
  student = api.load(runs / 'student', overrides=sequential)
  assert set(student.params) == {'flow', 'prior', 'student'}
  np.testing.assert_array_equal(student.sample([1, 2]), teacher.sample([1, 2]))
  images = teacher.sample([1, 2])
  np.testing.assert_array_equal(student.log_prob(images).nats, teacher.log_prob(images).nats)
  fast = api.load(runs / 'student')
  assert fast.config.sampling.inverse == 'student' and fast.sample([1, 2]).shape == (2, 8, 8, 1)


def message(function, *args):
  with pytest.raises(errors.UserError) as caught:
    function(*args)
  text = str(caught.value)
  assert '\n' not in text
  return text


def test_missing_teacher(student, tmp_path):
  nowhere = student_config(tmp_path / 'nowhere')
  text = message(distill.run, nowhere, tmp_path / 'new')
  assert 'nowhere' in text and '--config.teacher=RUN' in text
  assert not (tmp_path / 'new').exists()
  shutil.rmtree(student.parent / 'teacher')
  assert '--config.teacher=RUN' in message(sample.run, configured(student), student)
  unnamed = dataclasses.replace(nowhere, teacher=None)
  assert 'config.teacher' in message(config.check, unnamed)


def test_teacher_without_checkpoint(student, tmp_path):
  teacher = student.parent / 'teacher'
  shutil.rmtree(teacher / 'checkpoints')
  assert 'no checkpoint' in message(distill.run, student_config(teacher), tmp_path / 'new')


def test_teacher_with_another_model(student, tmp_path):
  settings = student_config(student.parent / 'teacher')
  wider = dataclasses.replace(
    settings.model, flow=dataclasses.replace(settings.model.flow, width=64)
  )
  text = message(distill.run, dataclasses.replace(settings, model=wider), tmp_path / 'new')
  assert 'model.flow.width' in text and '32' in text and '64' in text


def test_teacher_that_was_trained_again(student):
  file = student.parent / 'teacher' / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'seed': 7}))
  text = message(sample.run, configured(student), student)
  assert 'seed' in text and '--config.teacher=RUN' in text


def test_teacher_without_the_recorded_checkpoint(student):
  checkpoints = student.parent / 'teacher' / 'checkpoints'
  (checkpoints / '60').rename(checkpoints / '70')
  text = message(sample.run, configured(student), student)
  assert 'step 60' in text and 'keep_checkpoints' in text


def test_sampling_with_a_student_needs_a_student(student):
  teacher = student.parent / 'teacher'
  text = message(config.check, configured(teacher, inverse='student'))
  assert '--job=distill' in text


def test_model_without_flow_cannot_be_distilled():
  settings = student_config('teacher')
  model = dataclasses.replace(settings.model, flow=config.Flow(blocks=0))
  assert 'model.flow.blocks' in message(config.check, dataclasses.replace(settings, model=model))
