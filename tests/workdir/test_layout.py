"""A workdir belongs to one run; other folders of the user are never changed."""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile

import pytest

from farmer_jax import config, errors
from farmer_jax.workdir import layout, stores
from tests.support import filesystems

CONFIG = config.Config()


def test_claim_writes_the_configuration(tmp_path, monkeypatch):
  workdir = layout.claim(CONFIG, tmp_path / 'a' / 'b')
  assert json.loads((workdir / 'config.json').read_text()) == config.to_dict(CONFIG)
  assert layout.claim(CONFIG, workdir) == layout.open_run(CONFIG, workdir) == workdir
  monkeypatch.chdir(tmp_path)
  assert layout.claim(CONFIG, 'run').is_absolute()
  monkeypatch.setattr(stores, 'check', lambda path: None)
  assert str(layout.absolute('gs://bucket/run')) == 'gs://bucket/run'


@pytest.mark.parametrize('name', ['[lr=1e-3]', 'run*', 'run?'])
def test_paths_that_are_patterns_are_refused(tmp_path, name):
  """etils and Orbax would not find the checkpoints."""
  with pytest.raises(errors.WorkdirError, match='pattern'):
    layout.claim(CONFIG, tmp_path / name)
  assert not list(tmp_path.iterdir())


def test_files_of_launchers_do_not_occupy_a_workdir(tmp_path):
  for name in ('.gitkeep', 'slurm-1.out', 'train.log'):
    (tmp_path / name).write_text('')
  (tmp_path / 'lost+found').mkdir()
  layout.claim(CONFIG, tmp_path)
  assert (tmp_path / 'train.log').exists()


def test_results_of_a_read_only_run():
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    root.chmod(0o777)
    run = layout.claim(CONFIG, root / 'run')
    assert layout.results_folder(CONFIG, run) == run
    elsewhere = dataclasses.replace(CONFIG, results=str(root / 'results'))
    pathlib.Path(run).chmod(0o555)
    with filesystems.unprivileged():
      with pytest.raises(errors.WorkdirError, match=r'config\.results=FOLDER'):
        layout.results_folder(CONFIG, run)
      folder = layout.results_folder(elsewhere, run)
      assert folder == layout.results_folder(elsewhere, run) == layout.absolute(root / 'results')
      with pytest.raises(errors.WorkdirError, match='has results of another run'):
        layout.results_folder(elsewhere, layout.absolute(root / 'other'))


def test_results_of_a_run_that_was_replaced_are_not_those_of_the_new_run(tmp_path):
  elsewhere = dataclasses.replace(CONFIG, results=str(tmp_path / 'results'))
  layout.results_folder(elsewhere, layout.claim(CONFIG, tmp_path / 'run'))
  layout.results_folder(elsewhere, layout.claim(CONFIG, tmp_path / 'run'))
  shutil.rmtree(tmp_path / 'run')
  with pytest.raises(errors.WorkdirError, match='has results of another run'):
    layout.results_folder(elsewhere, layout.claim(CONFIG, tmp_path / 'run'))


def test_names_of_results_differ_if_the_settings_differ():
  labels = 'a b', 'a_b', 'a/b'
  names = [layout.results_name(3, config.Sampling(labels=value), ()) for value in labels]
  assert len(set(names)) == 3 and names[1] == '3-labels=a_b'


def test_another_configuration_is_refused_with_the_difference(tmp_path):
  layout.claim(CONFIG, tmp_path / 'run')
  before = (tmp_path / 'run' / 'config.json').read_bytes()
  other = dataclasses.replace(CONFIG, model=config.Model(patch_size=4))
  for function in layout.claim, layout.open_run:
    with pytest.raises(errors.WorkdirError, match='model.patch_size is 2 there and 4 here'):
      function(other, tmp_path / 'run')
  assert (tmp_path / 'run' / 'config.json').read_bytes() == before


def test_settings_that_change_no_result_may_change(tmp_path):
  layout.claim(CONFIG, tmp_path / 'run')
  moved = dataclasses.replace(CONFIG, data=config.Data(path='elsewhere', threads=9))
  layout.claim(moved, tmp_path / 'run')
  assert layout.read_config(tmp_path / 'run') == config.to_dict(moved)


def test_key_that_an_older_run_lacks_counts_as_its_default(tmp_path):
  saved = config.to_dict(CONFIG)
  del saved['model']['flow']['final_permutation']
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  layout.open_run(CONFIG, tmp_path)
  other = config.Model(flow=config.Flow(final_permutation=False))
  with pytest.raises(errors.WorkdirError, match='final_permutation is True there'):
    layout.open_run(dataclasses.replace(CONFIG, model=other), tmp_path)


def test_other_folders_and_files_are_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('mine')
  for path in tmp_path, tmp_path / 'thesis.tex', tmp_path / 'thesis.tex' / 'run':
    with pytest.raises(errors.WorkdirError, match=str(path)):
      layout.claim(CONFIG, path)
  assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('thesis.tex', b'mine')]
  with pytest.raises(errors.WorkdirError, match='config.json'):
    layout.read_config(tmp_path)


def test_corrupt_configuration_is_refused(tmp_path):
  for text in '{"name": ', '[]', '\x00':
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(errors.WorkdirError, match='config.json'):
      layout.claim(CONFIG, tmp_path)
    assert (tmp_path / 'config.json').read_text() == text


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_folder_without_write_permission_is_refused(tmp_path):
  (tmp_path / 'locked').mkdir(mode=0o500)
  with pytest.raises(errors.WorkdirError, match='locked'):
    layout.claim(CONFIG, tmp_path / 'locked')
