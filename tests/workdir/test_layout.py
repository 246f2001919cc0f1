"""A workdir belongs to one run; nothing else in the user's folders is ever touched."""

import dataclasses
import json
import os

import pytest

from farmer_jax import config, errors
from farmer_jax.workdir import layout


def contents(path):
  return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_new_folder_gets_the_resolved_configuration(tmp_path):
  made = layout.prepare(config.Config(), tmp_path / 'a' / 'b')
  assert json.loads((made / 'config.json').read_text()) == config.to_dict(config.Config())
  assert layout.prepare(config.Config(), made) == made


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert layout.prepare(config.Config(), 'run').is_absolute()
  assert str(layout.absolute('gs://bucket/run')) == 'gs://bucket/run'


def test_another_configuration_is_refused_with_the_difference(tmp_path):
  layout.prepare(config.Config(), tmp_path / 'run')
  before = contents(tmp_path / 'run')
  other = dataclasses.replace(config.Config(), model=config.Model(patch_size=4))
  with pytest.raises(errors.ConfigError, match='model.patch_size is 2 there and 4 here'):
    layout.prepare(other, tmp_path / 'run')
  assert contents(tmp_path / 'run') == before


def test_settings_that_change_no_result_may_change(tmp_path):
  layout.prepare(config.Config(), tmp_path / 'run')
  moved = dataclasses.replace(config.Config(), data=config.Data(path='elsewhere', threads=9))
  layout.prepare(moved, tmp_path / 'run')
  assert layout.read_config(tmp_path / 'run') == config.to_dict(moved)


def test_a_run_of_an_older_version_goes_on(tmp_path):
  layout.prepare(config.Config(), tmp_path / 'run')
  saved = config.to_dict(config.Config())
  del saved['model']['flow']['final_permutation']
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(saved))
  layout.prepare(config.Config(), tmp_path / 'run')
  without = config.Model(flow=config.Flow(final_permutation=False))
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(saved))
  with pytest.raises(errors.ConfigError, match='final_permutation is True there'):
    layout.prepare(dataclasses.replace(config.Config(), model=without), tmp_path / 'run')


def test_foreign_folders_and_files_are_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('mine')
  with pytest.raises(errors.ConfigError, match='not a run of this program'):
    layout.prepare(config.Config(), tmp_path)
  assert contents(tmp_path) == {'thesis.tex': b'mine'}
  with pytest.raises(errors.ConfigError, match='is a file'):
    layout.prepare(config.Config(), tmp_path / 'thesis.tex')


@pytest.mark.parametrize('text', ['{"name": ', '[]', '\x00'])
def test_a_broken_configuration_is_refused(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(errors.ConfigError, match='cannot read'):
    layout.prepare(config.Config(), tmp_path)
  assert (tmp_path / 'config.json').read_text() == text


def test_an_unwritable_place_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.ConfigError, match='cannot write to the workdir'):
    layout.prepare(config.Config(), tmp_path / 'file' / 'run')
  if os.geteuid() != 0:  # root may write everywhere
    (tmp_path / 'locked').mkdir(mode=0o500)
    with pytest.raises(errors.ConfigError, match='cannot write to the workdir'):
      layout.prepare(config.Config(), tmp_path / 'locked' / 'run')


def test_reading_what_is_no_run(tmp_path):
  with pytest.raises(errors.ConfigError, match='is not a run'):
    layout.read_config(tmp_path)
