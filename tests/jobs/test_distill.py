"""Distillation of a tiny run: training, sampling, and checks of the teacher."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from farmer_jax import api, config, errors, sampling, teacher
from farmer_jax.data import pipeline, sources
from farmer_jax.distributed import mesh
from farmer_jax.evaluation import classifier, validation
from farmer_jax.jobs import distill, pretrain, sample
from farmer_jax.nn import student as student_lib
from farmer_jax.workdir import layout
from tests.support.models import replace

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
    **dict(steps=60, batch_size=32, validate_every=0, sample_every=0, checkpoint_every=60),
    optimizer=config.Optimizer(learning_rate=1e-2, warmup_steps=10),
  ),
  sampling=config.Sampling(count=20, batch_size=8, denoise=True),
)


def student_config(teacher, **train):
  changes = dict(steps=600, validate_every=600, sample_every=600, checkpoint_every=200) | train
  distilled = replace(TEACHER, job='distill', teacher=str(teacher), train=changes)
  return replace(distilled, distill=dict(input_noise_std=0.05))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The folder of a teacher's run."""
  folder = tmp_path_factory.mktemp('runs')
  pretrain.run(TEACHER, folder / 'teacher')
  return folder


@pytest.fixture(scope='module')
def runs(folder):
  """The folder of a teacher's run and a student's run."""
  distill.run(student_config(folder / 'teacher'), folder / 'student')
  return folder


@pytest.fixture
def student(runs, tmp_path):
  """A copy of the student's run and of the teacher's run, which the test may change."""
  folder = shutil.copytree(runs, tmp_path / 'runs') / 'student'
  update_json(folder / 'config.json', teacher=str(tmp_path / 'runs' / 'teacher'))
  return folder


def update_json(file, **changes):
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def configured(workdir, **changes):
  found = config.from_config_dict(layout.read_config(workdir))
  return replace(found, job='sample', sampling=changes)


def last_record(workdir):
  return json.loads((workdir / 'metrics.jsonl').read_text().splitlines()[-1])


def images(folder):
  (file,) = folder.glob('*.npz')
  return np.load(file)['arr_0'].astype(int)


def test_error_falls_by_a_factor_of_10_and_results_are_written(runs):
  final, settings = last_record(runs / 'student'), student_config(runs / 'teacher')
  assert final['split'] == 'valid' and final['step'] == 600
  teacher = api.load(runs / 'teacher').params
  evaluate = validation.ReconstructionEvaluator(student_lib.build(settings), settings, teacher)
  images = sources.load(settings.data, 'valid')
  # The initial student is a copy of the teacher's flow.
  first = evaluate({'student': teacher['flow']}, pipeline.evaluation_batches(images, 200))
  assert first['rmse'] > 0.05
  assert final['loss'] < first['loss'] / 10
  assert final['rmse'] ** 2 < first['rmse'] ** 2 / 10
  assert final['psnr'] == pytest.approx(20 * np.log10(2 / final['rmse']))

  folder = runs / 'student'
  assert json.loads((folder / 'config.json').read_text())['teacher'] == str(runs / 'teacher')
  assert json.loads((folder / 'teacher.json').read_text())['step'] == 60
  for name in ('samples/600.png', 'figures/student.png', 'figures/curves.png'):
    assert Image.open(folder / name).size[0] > 100


def test_samples_of_the_student_are_close_to_exact_samples(student):
  """The teacher draws the same exact images."""
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
  teacher = student.parent / 'teacher'
  sample.run(configured(teacher, inverse='sequential'), teacher)
  again = images(teacher / 'samples' / '60-inverse=sequential-denoise=True')
  np.testing.assert_array_equal(again, exact)


def test_refined_samples_report_their_residual(runs):
  settings = configured(runs / 'student', inverse='student', refinement_rounds=1)
  loaded, labels = api.Run(runs / 'student', settings), np.arange(4)
  found = sampling.Sampler(loaded.model, settings)(loaded.params, labels, labels)
  assert (found.residual > settings.sampling.tolerance).all() and (found.passes == 1).all()


def test_hidden_objective_and_generated_images(runs, tmp_path):
  settings = student_config(runs / 'teacher', steps=3, validate_every=3, sample_every=0)
  hidden = config.Distill(objective='hidden', generated_fraction=0.5)
  distill.run(replace(settings, distill=hidden), tmp_path)
  sample.run(configured(tmp_path, inverse='student'), tmp_path)
  assert len(images(tmp_path / 'samples' / '3-inverse=student-denoise=True')) == 20
  with pytest.raises(errors.ConfigError, match='refinement_rounds.*objective=outputs'):
    config.check(configured(tmp_path, inverse='student', refinement_rounds=1))


@pytest.fixture(scope='module')
def small_student(folder, tmp_path_factory):
  """A narrower student with all options, which also removes the noise."""
  workdir = tmp_path_factory.mktemp('small') / 'student'
  steps = dict(steps=20, validate_every=20, sample_every=0, checkpoint_every=20)
  settings = student_config(folder / 'teacher', **steps)
  options = dict(
    **dict(all_tokens=True, denoise=True, normalize_targets=True, width=16),
    **dict(objective='hidden', perceptual_weight=1.0),
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(classifier, '_STEPS', 20)
    distill.run(replace(settings, distill=options), workdir)
  return workdir


def test_student_with_all_options(small_student):
  lines = (small_student / 'metrics.jsonl').read_text().splitlines()
  train, valid = map(json.loads, lines[-2:])
  assert train['loss_perceptual'] > 0 and 'loss_perceptual' not in valid
  # The mean over all blocks does not include the perceptual loss.
  assert train['loss'] > (train['loss_block_0'] + train['loss_block_1']) / 2 + 1e-3
  assert valid['rmse_noise_free'] == pytest.approx(valid['loss_block_0'] ** 0.5)
  # The error relative to the noisy image includes its noise, of standard deviation 0.1.
  assert valid['rmse'] > 0.09 and valid['rmse'] != valid['rmse_noise_free']
  assert len(list((small_student / 'fidelity').glob('classifier-*.npz'))) == 1
  stack = api.load(small_student).params['student']['stack']
  assert stack['positions'].shape == (2, 16, 16)


def test_samples_of_a_denoising_student_are_not_denoised_again(small_student):
  for denoise in (True, False):
    settings = configured(small_student, inverse='student', denoise=denoise)
    sample.run(settings, small_student)
  folder = small_student / 'samples'
  once, again = (images(folder / f'20-inverse=student{name}') for name in ('', '-denoise=True'))
  assert len(once) == 20
  np.testing.assert_array_equal(once, again)
  # Samples of the exact inverse need the denoising step.
  exact = [
    api.load(small_student, overrides={'sampling.inverse': 'sequential', 'sampling.denoise': value})
    for value in (True, False)
  ]
  assert (exact[0].sample([1, 2]) != exact[1].sample([1, 2])).any()


def test_configuration_without_the_newer_keys(student, runs):
  """Earlier versions did not save these keys. Their students are read as before."""
  saved = json.loads((student / 'config.json').read_text())
  saved['distill'] = {k: saved['distill'][k] for k in ('objective', 'input_noise_std')}
  update_json(student / 'config.json', distill=saved['distill'])
  found, expected = (api.load(run).sample([1, 2]) for run in (student, runs / 'student'))
  np.testing.assert_array_equal(found, expected)


def test_resumed_student_uses_the_recorded_checkpoint_of_the_teacher(student, runs):
  """The teacher has a newer checkpoint. The student uses step 60 and ends with the same loss."""
  teacher = student.parent / 'teacher'
  shutil.copytree(teacher / 'checkpoints' / '60', teacher / 'checkpoints' / '70')
  reference = last_record(runs / 'student')
  for step in ('400', '600'):
    shutil.rmtree(student / 'checkpoints' / step, ignore_errors=True)
  shutil.copytree(runs / 'student' / 'checkpoints' / '400', student / 'checkpoints' / '400')
  distill.run(config.from_config_dict(layout.read_config(student)), student)
  again = last_record(student)
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
  assert 'config.teacher' in message(config.check, replace(nowhere, teacher=None))


def test_teacher_with_another_model_or_without_checkpoint(student, tmp_path):
  settings = student_config(student.parent / 'teacher')
  wider = replace(settings, model=dict(flow=dict(width=64)))
  text = message(distill.run, wider, tmp_path / 'new')
  assert 'model.flow.width' in text and '32' in text and '64' in text
  others = dict(patch_basis='pixels', mlp='gated', qk_norm=True, neighborhood=True)
  for name, value in others.items():
    text = message(distill.run, replace(settings, model={name: value}), tmp_path / 'new')
    assert f'model.{name}' in text and repr(value) in text
  shutil.rmtree(student.parent / 'teacher' / 'checkpoints')
  assert 'no checkpoint' in message(distill.run, settings, tmp_path / 'new')


def test_teacher_that_was_trained_again_or_lost_the_recorded_checkpoint(student):
  checkpoints = student.parent / 'teacher' / 'checkpoints'
  (checkpoints / '60').rename(checkpoints / '70')
  text = message(sample.run, configured(student), student)
  assert 'step 60' in text and 'keep_checkpoints' in text
  (checkpoints / '70').rename(checkpoints / '60')
  update_json(checkpoints.parent / 'config.json', seed=7)
  text = message(sample.run, configured(student), student)
  assert 'seed' in text and '--config.teacher=RUN' in text


def test_teacher_can_be_extended(student):
  file = student.parent / 'teacher' / 'config.json'
  train = json.loads(file.read_text())['train']
  update_json(file, train=train | {'steps': 90, 'extensions': '60:60:keep_final'})
  _, record = teacher.restore_teacher(configured(student), student, mesh.LocalDevices())
  assert record['step'] == 60


def test_distillation_needs_a_flow_and_sampling_needs_a_student(runs):
  unsuitable = configured(runs / 'teacher', inverse='student')
  assert '--job=distill' in message(config.check, unsuitable)
  without_flow = replace(student_config('teacher'), model=dict(flow=config.Flow(blocks=0)))
  assert 'model.flow.blocks' in message(config.check, without_flow)
