"""`--job=export` of tiny runs, the Python API and other jobs on exports, and the model card."""

import dataclasses
import functools
import json
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest
import yaml
from etils import epath
from PIL import Image

import farmer_jax
from configs import from_run
from farmer_jax import api, config, errors, teacher
from farmer_jax.data import sources
from farmer_jax.distributed import mesh
from farmer_jax.jobs import distill, export, likelihood, pretrain, sample
from farmer_jax.workdir import layout
from tests.support import processes, runs
from tests.support.models import replace

SETTINGS = {'sampling.batch_size': 8, 'likelihood.batch_size': 20}
LABELS = [1, 2, None, 1]


def configured(workdir, job='export', **changes):
  found = config.from_config_dict(layout.read_config(workdir))
  return replace(found, job=job, **changes)


def exported(workdir, folder, **changes):
  return export.run(configured(workdir, export=dict(path=str(folder)) | changes), workdir)


@pytest.fixture(scope='module')
def folder(trained, tmp_path_factory):
  """An export of the tiny run, which tests must not change."""
  return exported(trained, tmp_path_factory.mktemp('exports') / 'export')


@pytest.fixture(scope='module')
def images():
  return sources.load(runs.CONFIG.data, 'valid').gather(np.arange(4))['image']


def refusal(error, function, *args, **options):
  with pytest.raises(error) as caught:
    function(*args, **options)
  message = str(caught.value)
  assert '\n' not in message
  return message


def assert_same(found, expected, images):
  """Asserts equal parameters, densities, latents and pixels of two runs."""
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
  for name in ('log_prob', 'encode'):
    results = [getattr(run, name)(images, LABELS) for run in (found, expected)]
    arrays = ([r.nats, r.log_det] if name == 'log_prob' else [r] for r in results)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *arrays)
  for name, arguments in (('sample', [LABELS]), ('decode', [found.encode(images), LABELS])):
    pixels = (getattr(run, name)(*arguments) for run in (found, expected))
    np.testing.assert_array_equal(*pixels)


def test_loaded_export_equals_the_run(folder, trained, images):
  found, expected = (farmer_jax.load(path, overrides=SETTINGS) for path in (folder, trained))
  assert isinstance(found, farmer_jax.Run) and found.step == expected.step == 3
  assert found.class_names == expected.class_names == tuple('0123456789')
  assert found.config == expected.config
  assert_same(found, expected, images)


def test_export_loads_by_its_file_and_at_its_step(folder, trained):
  expected = farmer_jax.load(trained).params
  for path, step in ((folder / 'model.safetensors', None), (str(folder), 3)):
    found = farmer_jax.load(path, step=step).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert 'step 3' in refusal(errors.CheckpointError, lambda: farmer_jax.load(folder, step=7))


def test_default_folder_and_several_files(run):
  settings = configured(run, export=dict(max_file_gigabytes=2e-5))
  folder = export.run(settings, run)
  assert str(folder) == str(run / 'export')
  assert len(list(folder.glob('model-*-of-*.safetensors'))) > 2
  found, expected = farmer_jax.load(folder), farmer_jax.load(run)
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_record_has_the_settings_and_no_paths(run, tmp_path):
  private = dict(data=dict(path='/secret/data'), likelihood=dict(path='/secret/images'))
  private |= dict(fidelity=dict(weights='/secret/weights'), results=str(tmp_path / 'secret'))
  export.run(
    configured(run, export=dict(path=str(tmp_path / 'e')), sampling=dict(count=7), **private), run
  )
  text = (tmp_path / 'e' / 'config.json').read_text()
  assert 'secret' not in text + (tmp_path / 'e' / 'README.md').read_text()
  assert str(tmp_path) not in text
  record = json.loads(text)
  assert record['farmer_jax_version'] == farmer_jax.__version__
  assert (record['model_type'], record['export_format'], record['step']) == ('farmer', 1, 3)
  assert record['parameters'] == 'ema_params' and record['class_names'][9] == '9'
  assert record['config']['sampling']['count'] == 7 and record['config']['job'] == 'pretrain'
  assert (tmp_path / 'e' / 'torch_farmer.py').read_bytes() == export._TORCH_FILE.read_bytes()


@pytest.mark.faults
def test_export_on_meshes_of_eight_devices(folder, trained):
  """Each device reads its share of the parameters. Densities and images are those of the run."""
  program = functools.partial(processes.run_program, 'exported_shards', devices=8)
  for name, found in json.loads(program(trained, folder, '1x8x1', '2x2x2')).items():
    _, fsdp, tensor = map(int, name.split('x'))
    assert found['equal'], name
    assert found['share'] < 1.3 / (fsdp * tensor), name
    assert found['log_prob'] < 1e-6 and found['pixels'] <= 1, name
    assert found['exported_again'], name


# Distillation.


@pytest.fixture(scope='module')
def student(trained, tmp_path_factory):
  """The workdir of a distillation run."""
  settings = replace(
    runs.CONFIG, job='distill', teacher=str(trained), distill=dict(width=8, all_tokens=True)
  ).with_sampling(inverse='student')
  return runs.save_run(tmp_path_factory.mktemp('students') / 'run', settings)


@pytest.fixture(scope='module')
def exported_student(student, tmp_path_factory):
  return exported(student, tmp_path_factory.mktemp('exports') / 'student')


def test_export_of_a_student_has_its_teacher(exported_student, student, trained, images):
  found, expected = (
    farmer_jax.load(path, overrides=SETTINGS) for path in (exported_student, student)
  )
  assert found.config.sampling.inverse == 'student'
  assert set(found.params) == {'flow', 'prior', 'student'}
  assert_same(found, expected, images)
  assert found.density[1] == 3 and set(found.density[0]) == {'flow', 'prior'}
  exact = farmer_jax.load(exported_student, overrides={'sampling.inverse': 'sequential'})
  np.testing.assert_array_equal(exact.sample(LABELS), farmer_jax.load(trained).sample(LABELS))
  assert str(trained) not in (exported_student / 'config.json').read_text()


def test_export_as_a_teacher(folder, student, tmp_path):
  settings = configured(student, 'distill', teacher=str(folder))
  params, record = teacher.restore_teacher(settings, tmp_path, mesh.LocalDevices())
  expected = farmer_jax.load(folder).params
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert record['step'] == 3 and record['config'] == layout.read_config(folder)
  assert 'is an export' in refusal(errors.WorkdirError, distill.run, settings, folder)


# Folders that are refused.


def test_refused_folders(run, folder, tmp_path):
  (tmp_path / 'notes.txt').write_text('x')
  message = refusal(errors.WorkdirError, exported, run, tmp_path)
  assert str(tmp_path) in message and 'config.export.path' in message
  assert sorted(file.name for file in tmp_path.iterdir()) == ['notes.txt', 'run']
  assert 'not an export' in refusal(errors.WorkdirError, exported, run, run)
  assert 'export already' in refusal(errors.WorkdirError, exported, folder, tmp_path / 'x')
  message = refusal(errors.CheckpointError, exported, run, tmp_path / 'x', step=8)
  assert 'step 8' in message


def test_export_of_a_run_that_took_a_part_of_another(run, tmp_path):
  saved = layout.read_config(run) | {'init_from': '/secret/RUN/checkpoints/4', 'init_parts': 'flow'}
  (run / 'config.json').write_text(json.dumps(saved))
  folder = exported(run, tmp_path / 'e')
  assert farmer_jax.load(folder, overrides=SETTINGS).sample([0]).shape == (1, 8, 8, 1)
  config.check(config.from_config_dict(layout.read_config(folder)))
  assert 'the flow started from the trained parameters of `RUN at step 4`' in card(folder)[1]


def test_new_export_keeps_files_of_others(run, tmp_path):
  folder = exported(run, tmp_path / 'e')
  (folder / 'model_mine.safetensors').write_text('mine')
  (folder / 'samples.png').write_text('of an older checkpoint')
  exported(run, folder)
  assert (folder / 'model_mine.safetensors').read_text() == 'mine'
  assert not (folder / 'samples.png').exists()


def test_nothing_is_written_to_the_hub(run, hub):
  message = refusal(errors.WorkdirError, exported, run, 'hf://someone/digits')
  assert 'config.export.path' in message and not hub
  settings = configured(run, 'sample', results='hf://someone/digits')
  assert 'config.results' in refusal(errors.WorkdirError, sample.run, settings, run)


def test_exports_are_not_written_to_stores(run, monkeypatch):
  monkeypatch.setattr(layout.stores, 'check', lambda path: None)
  message = refusal(errors.WorkdirError, exported, run, 'gs://bucket/export')
  assert 'local' in message and 'config.export.path' in message


def test_an_export_is_not_trained_further(folder, monkeypatch):
  settings = configured(folder, 'pretrain')
  before = {file.name: file.read_bytes() for file in folder.iterdir()}
  assert 'is an export' in refusal(errors.WorkdirError, pretrain.run, settings, folder)
  assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_other_jobs_on_an_export_write_to_another_folder(folder, trained, tmp_path):
  values = from_run.get_config(str(folder))
  values.job, values.sampling.count, values.sampling.batch_size = 'sample', 12, 8
  values.likelihood.examples = 20
  settings = config.from_config_dict(values)
  assert '--config.results' in refusal(errors.WorkdirError, sample.run, settings, folder)
  before = sorted(file.name for file in folder.iterdir())
  settings = dataclasses.replace(settings, results=str(tmp_path / 'results'))
  drawn = runs.read_samples(epath.Path(sample.run(settings, folder)))['arr_0']
  run_settings = dataclasses.replace(settings, results=str(tmp_path / 'of the run'))
  expected = runs.read_samples(epath.Path(sample.run(run_settings, trained)))['arr_0']
  assert len(drawn) == 12
  np.testing.assert_array_equal(drawn, expected)
  likelihood.run(dataclasses.replace(settings, job='likelihood'), folder)
  (report,) = (tmp_path / 'results' / 'likelihood').glob('*.json')
  assert json.loads(report.read_text())['checkpoint_step'] == 3
  assert sorted(file.name for file in folder.iterdir()) == before


# The hub.


@pytest.fixture
def hub(monkeypatch, folder):
  """A stand-in for the package huggingface_hub. Yields the arguments of its calls."""
  calls = []

  def snapshot_download(name, **options):
    calls.append((name, options['revision']))
    assert not any(pattern.endswith('py') for pattern in options['allow_patterns'])
    if name == 'user/missing':
      raise OSError('404 Client Error.\n\nRepository Not Found')
    return str(folder)

  module = types.ModuleType('huggingface_hub')
  module.snapshot_download = snapshot_download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  layout.hub.download.cache_clear()
  yield calls
  layout.hub.download.cache_clear()


def test_load_from_the_hub(hub, folder):
  found = farmer_jax.load('hf://user/name')
  assert found.step == 3 and str(found.workdir) == str(folder) and found.params
  assert from_run.get_config('hf://user/name').name == 'tiny'
  assert hub == [('user/name', None)]
  assert farmer_jax.load('hf://user/name@v1.0').step == 3
  assert hub[-1] == ('user/name', 'v1.0')


def test_errors_of_the_hub(hub, monkeypatch):
  load = functools.partial(refusal, errors.WorkdirError, farmer_jax.load)
  for url, named in (('hf://name', 'USER/NAME'), ('hf://user/missing', '404')):
    message = load(url)
    assert url in message and named in message
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  assert 'farmer_jax[hub]' in load('hf://user/other')


# The model card.


def card(folder):
  """Returns the metadata and the text of a card."""
  _, front, text = (folder / 'README.md').read_text().split('---\n', 2)
  return yaml.safe_load(front), text


def test_metadata_of_the_card(folder, run, tmp_path):
  metadata, text = card(folder)
  assert metadata['library_name'] == 'farmer_jax' and metadata['license'] == 'unknown'
  assert metadata['pipeline_tag'] == 'unconditional-image-generation' and metadata['tags']
  assert 'license of the weights is unknown' in text and 'No results' in text
  assert "farmer_jax.load('FOLDER')" in text and 'torch_farmer' in text
  assert '![Samples]' not in text and not (folder / 'samples.png').exists()
  metadata, text = card(exported(run, tmp_path / 'e', license='cc-by-4.0'))
  assert metadata['license'] == 'cc-by-4.0' and 'unknown' not in text
  for value in ('a\nb', 'x: y', 'MIT License', ''):
    settings = configured(run, export=dict(license=value))
    assert 'config.export.license' in refusal(errors.ConfigError, config.check, settings)


def test_results_and_samples_of_the_card(run, tmp_path):
  metrics = [
    dict(step=2, split='valid', bits_per_dim=7.5, loss=1.0),
    dict(step=3, split='valid', bits_per_dim=6.25, loss=0.9),
  ]
  (run / 'metrics.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in metrics))
  settings = configured(run, 'likelihood', likelihood=dict(examples=20, draws=2))
  likelihood.run(settings, run)
  settings = configured(run, 'sample').with_sampling(
    count=12, batch_size=8, redundant_variance=0.5, inverse='sequential'
  )
  sample.run(settings, run)
  (run / 'fidelity').mkdir(exist_ok=True)
  fidelity = dict(count=500, reference='/secret/digits-train', network='classifier')
  fidelity |= dict(classifier_frechet_distance=12.5, settings=dict(neighbors=5, weights='/secret'))
  fidelity |= dict(sampling=dataclasses.asdict(config.Sampling(redundant_variance=0.5)))
  for name, step, distance in (('old', 2, 99.5), ('new', 3, 12.5)):
    report = fidelity | dict(checkpoint_step=step, classifier_frechet_distance=distance)
    (run / 'fidelity' / f'{name}.json').write_text(json.dumps(report))
  folder = exported(run, tmp_path / 'e')
  _, text = card(folder)
  rows = [line for line in text.splitlines() if line.startswith('| ')][2:]
  assert len(rows) == 4 and '7.5' not in text and '99.5' not in text and 'secret' not in text
  assert '6.2500' in rows[0] and 'during training' in rows[0]
  (report,) = (run / 'likelihood').glob('*.json')
  bits = json.loads(report.read_text())['bits_per_dim']['mean']
  assert f'{bits:.4f}' in rows[1] and '20 images' in rows[1] and '`draws=2`' in rows[1]
  assert 'importance-weighted' in rows[2]
  assert '12.5000' in rows[3] and '500 samples' in rows[3] and '`neighbors=5`' in rows[3]
  assert '`redundant_variance=0.5`' in rows[3]
  assert re.search(r'Samples.*redundant_variance=0.5', text)
  assert Image.open(folder / 'samples.png').size[1] > 100
  found = (folder / 'samples.png').read_bytes()
  assert found == next((run / 'samples').glob('*/grid.png')).read_bytes()


def test_samples_of_training_and_a_separate_folder_of_results(run, tmp_path):
  (run / 'samples').mkdir()
  (run / 'samples' / '3.png').write_bytes(b'training')
  (tmp_path / 'results' / 'likelihood').mkdir(parents=True)
  report = dict(checkpoint_step=3, unit='bits/dim', count=5, settings={'split': 'valid'})
  report |= dict(bits_per_dim=dict(mean=4.125, standard_error=None))
  (tmp_path / 'results' / 'likelihood' / 'x.json').write_text(json.dumps(report))
  settings = configured(
    run, results=str(tmp_path / 'results'), export=dict(path=str(tmp_path / 'e'))
  )
  folder = export.run(settings, run)
  assert (folder / 'samples.png').read_bytes() == b'training'
  assert '4.1250' in card(folder)[1]


def test_card_of_a_student_has_the_results_of_the_teacher(student, trained, tmp_path):
  copies = {}
  for name, source, values in (
    ('teacher', trained, dict(bits_per_dim=6.25)),
    ('student', student, dict(loss=0.5, psnr=21.5)),
  ):
    copies[name] = layout.absolute(tmp_path / name)
    shutil.copytree(source, copies[name])
    line = dict(step=3, split='valid') | values
    (copies[name] / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  text = (copies['student'] / 'config.json').read_text()
  (copies['student'] / 'config.json').write_text(text.replace(str(trained), str(copies['teacher'])))
  _, text = card(exported(copies['student'], tmp_path / 'e'))
  assert '21.5000' in text and '6.2500' in text and '0.5000' not in text
  assert 'student' in text.partition('## Model')[0]


def test_processes_other_than_the_first_write_nothing(run, tmp_path, monkeypatch):
  monkeypatch.setattr(export.jax, 'process_index', lambda: 1)
  monkeypatch.setattr(api.Run, 'params', {})
  exported(run, tmp_path / 'e')
  assert not (tmp_path / 'e').exists()
