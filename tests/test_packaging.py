"""The wheel: what it contains, and that it works without the checkout."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import farmer_jax

ROOT = pathlib.Path(__file__).parents[1]


def test_configs_are_part_of_the_package():
  """Wheels follow the link. A configuration imports another one from the package."""
  assert (ROOT / 'farmer_jax' / 'configs').resolve() == ROOT / 'configs'
  for file in (ROOT / 'configs').glob('*.py'):
    assert not re.search(r'^(from|import) configs', file.read_text(), re.M), file.name


def test_citation_names_the_version():
  version = re.search(r'^version: (.*)$', (ROOT / 'CITATION.cff').read_text(), re.M)
  assert version and version[1] == farmer_jax.__version__


@pytest.fixture(name='wheel', scope='module')
def _wheel(tmp_path_factory):
  """A wheel that pip built from a source distribution. Contains the files of both."""
  pytest.importorskip('setuptools')
  folder = tmp_path_factory.mktemp('package')
  source = folder / 'source'
  for name in ('farmer_jax', 'configs', 'examples'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
  for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  build = 'from setuptools import build_meta; build_meta.build_sdist("dist")'
  subprocess.run([sys.executable, '-c', build], cwd=source, check=True)
  (sdist,) = (source / 'dist').iterdir()
  command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', f'-w{folder}', sdist]
  subprocess.run(command, check=True)
  (wheel,) = folder.glob('*.whl')
  return wheel


@pytest.mark.slow
def test_wheel_has_all_files(wheel):
  packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith('farmer_jax/')}
  files = [p for p in (ROOT / 'farmer_jax').rglob('*') if p.is_file() and p.suffix != '.pyc']
  files += (ROOT / 'farmer_jax' / 'configs').glob('*.py')
  assert packed == {str(file.relative_to(ROOT)) for file in files}


@pytest.mark.slow
def test_installed_wheel_trains_and_samples(wheel, tmp_path):
  """In an empty virtual environment, outside of the checkout."""
  environment, bin_ = tmp_path / 'environment', tmp_path / 'environment' / 'bin'
  subprocess.run([sys.executable, '-m', 'venv', environment], check=True)
  pins = ROOT / 'requirements.txt'
  subprocess.run([bin_ / 'pip', 'install', '-q', '-c', pins, wheel], check=True, timeout=900)

  def farmer(*arguments):
    hidden = ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [bin_ / 'farmer_jax', *arguments]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

  done = farmer('--config=quickstart', '--config.train.steps=20')
  assert done.returncode == 0, done.stderr
  assert re.search(r'Held-out likelihood \(180 images\): \d\.\d+ bits/dim', done.stdout)
  run = tmp_path / 'runs' / 'quickstart'
  assert (run / 'samples' / '20.png').exists() and (run / 'checkpoints' / '20').exists()
  sampling = '--job=sample', f'--workdir={run}', '--config.sampling.count=3'
  done = farmer('--config=from_run:runs/quickstart', *sampling)
  assert done.returncode == 0, done.stderr
  assert (run / 'samples' / '20').is_dir()
  done = farmer()
  assert done.returncode == 1 and done.stderr.startswith('error: no --config given')
  # A configuration that imports another one, and the names of the flags.
  assert 'data.path' in farmer('--config=in256_distill', '--config.teacher=x').stderr
  assert '--workdir' in farmer('--help').stdout
