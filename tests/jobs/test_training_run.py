"""The record of the data of a run: other classes or images are recognized at the next start."""

import dataclasses
import json

import pytest

from farmer_jax import config as config_lib
from farmer_jax import errors
from farmer_jax.evaluation import scoring
from farmer_jax.jobs import training_run
from farmer_jax.workdir import layout
from tests.support.data import write_classes, write_image

CLASSES = ['cat', 'dog', 'owl']


@pytest.fixture
def config(tmp_path):
  """A configuration for a folder of three classes with 10 images each, 3 of 30 for validation."""
  write_classes(tmp_path / 'images', CLASSES)
  data = config_lib.Data('folder', str(tmp_path / 'images'), 4, num_classes=3)
  train = config_lib.Train(batch_size=8, valid_batch_size=3)
  return config_lib.Config(data=data, train=train)


def start(config, tmp_path):
  """Starts a training job, up to the first step. Returns what data.json says."""
  resources = training_run.Resources.load(config)
  workdir = training_run.prepare_workdir(config, tmp_path / 'run', resources)
  return json.loads((workdir / 'data.json').read_text())


def test_data_are_recorded_and_recognized(config, tmp_path, caplog):
  record = start(config, tmp_path)
  assert record['training']['images'] == 27 and record['validation']['images'] == 3
  assert record['training']['classes'] == {'cat': 9, 'dog': 9, 'owl': 9}
  (tmp_path / 'images').rename(tmp_path / 'moved')
  moved = dataclasses.replace(config.data, path=str(tmp_path / 'moved'))
  start(dataclasses.replace(config, data=moved), tmp_path)
  assert not [record for record in caplog.records if record.levelname == 'WARNING']


def test_renamed_class_is_refused(config, tmp_path):
  start(config, tmp_path)
  (tmp_path / 'images' / 'cat').rename(tmp_path / 'images' / 'zebra')
  with pytest.raises(errors.WorkdirError, match=r'missing: cat; new: zebra'):
    start(config, tmp_path)
  assert layout.read_class_names(layout.absolute(tmp_path / 'run')) == tuple(CLASSES)


def test_as_many_other_training_images_are_refused(config, tmp_path):
  start(config, tmp_path)
  for path in (tmp_path / 'images').rglob('*.png'):
    write_image(path, 200 - int(path.stem))
  with pytest.raises(errors.WorkdirError, match='the training images are not those of the first'):
    start(config, tmp_path)


def test_other_validation_images_are_reported(tmp_path, config, caplog):
  (tmp_path / 'images').rename(tmp_path / 'train')
  write_classes(tmp_path / 'val', CLASSES, 2)
  data = dataclasses.replace(config.data, path=str(tmp_path))
  config = dataclasses.replace(config, data=data)
  start(config, tmp_path)
  write_image(tmp_path / 'val' / 'owl' / 'new.png', 99)
  start(config, tmp_path)
  (warning,) = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
  assert 'validation' in warning


def test_scored_images_have_the_labels_of_the_run(config, tmp_path):
  write_classes(tmp_path / 'other', ['dog', 'owl', 'zebra'])
  likelihood = config_lib.Likelihood(path=str(tmp_path / 'other'), split='train')
  config = dataclasses.replace(config, likelihood=likelihood)
  with pytest.raises(errors.DataError, match='zebra'):
    scoring.load_sources(config, CLASSES)
  data = dataclasses.replace(config.data, unknown_classes='leave_out')
  source, _ = scoring.load_sources(dataclasses.replace(config, data=data), CLASSES)
  assert set(source.labels) == {1, 2} and source.class_names == tuple(CLASSES)
