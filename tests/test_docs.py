"""Commands, names of configuration keys, links, and code in the documents."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import PIL.Image
import pytest

from farmer_jax import config as config_lib
from farmer_jax.config import fields
from farmer_jax.distributed import processes as processes_lib
from tests.support import command_line, documents, processes
from tests.support.documents import ROOT

SECTIONS = {f.name for f in dataclasses.fields(config_lib.Config) if fields.parse(f).section}
FILES = [*documents.PAGES, *documents.SOURCES]
KEYS = {path: key for path, key in config_lib.leaves()}
# Pages whose marked blocks run in one folder, in this order.
TUTORIALS = [('digits', 'likelihood'), ('photos',), ('distillation',)]


def names(files):
  return [str(file.relative_to(ROOT)) for file in files]


@pytest.fixture(scope='module')
def saved_runs(tmp_path_factory):
  """Workdirs with configurations of different kinds: a command on RUN must suit one of them."""
  from configs import fashion_mnist_distill, fashion_mnist_samples, in256, quickstart

  values = [c.get_config() for c in (quickstart, fashion_mnist_samples, in256)]
  values.append(fashion_mnist_distill.get_config())
  values[-1].teacher = 'RUN'
  folders = []
  for value in values:
    folders.append(tmp_path_factory.mktemp('run'))
    content = config_lib.to_dict(config_lib.from_config_dict(value))
    (folders[-1] / 'config.json').write_text(json.dumps(content))
  return folders


def parse(arguments, saved_runs, monkeypatch, capsys):
  """Parses a command with the code of the program. Returns the error messages, or []."""
  if '…' in arguments:
    arguments = ['--config=configs/quickstart.py', *(a for a in arguments if a != '…')]
  arguments = [
    re.sub(r'^--config=(…|\.\.\.)$', '--config=configs/quickstart.py', a) for a in arguments
  ]
  arguments = [re.sub(r':\$\w+$', '', a) if a.startswith('--config=') else a for a in arguments]
  monkeypatch.setattr(processes_lib, 'start', lambda *_: None)
  errors = []
  for folder in saved_runs:
    used = [re.sub(r'from_run\.py:.+', f'from_run.py:{folder}', a) for a in arguments]
    outcome = command_line.run(used, monkeypatch, capsys)
    if outcome.code == 0:
      return []
    errors.append(outcome.err)
    if used == arguments:
      break
  return errors


@pytest.mark.parametrize('name', names(f for f in FILES if documents.commands(f.read_text())))
def test_commands_are_valid(name, saved_runs, monkeypatch, capsys):
  for arguments in documents.commands((ROOT / name).read_text()):
    if not any(a.startswith('--config') or a == '…' for a in arguments):
      continue
    errors = parse(arguments, saved_runs, monkeypatch, capsys)
    assert not errors, f'{" ".join(arguments)}\n{"".join(errors)}'


def test_all_kinds_of_commands_are_found():
  text = (
    '    python -m farmer_jax.main --a=b \\\n      --c.d=1  # --e\n`launch/local.sh 2 --f="g h"`'
  )
  assert documents.commands(text) == [['--a=b', '--c.d=1'], ['--f=g', 'h']]
  count = {
    name: len(documents.commands((ROOT / name).read_text()))
    for name in ('README.md', 'docs/guides/processes.md', 'configs/in256.py', 'launch/tpu_pod.sh')
  }
  assert count == {
    'README.md': 2,
    'docs/guides/processes.md': 5,
    'configs/in256.py': 3,
    'launch/tpu_pod.sh': 2,
  }


@pytest.mark.parametrize(
  'command',
  ['--config=configs/no.py', '--config=configs/quickstart.py --config.train.step=3',
   '--config=configs/in256.py:2b', '--config=configs/from_run.py:RUN --job=smple',
   '--config=configs/quickstart.py --flag'],
)  # fmt: skip
def test_wrong_commands_are_found(command, saved_runs, monkeypatch, capsys):
  (arguments,) = documents.commands(f'python -m farmer_jax.main {command}')
  assert parse(arguments, saved_runs, monkeypatch, capsys)


@pytest.mark.parametrize('name', names(documents.PAGES))
def test_names_and_values_of_keys_are_valid(name):
  if name == 'CHANGELOG.md':  # It has old names.
    return
  for path, value in documents.keys(ROOT / name, SECTIONS):
    if path == 'model.safetensors':  # a file
      continue
    inside = any(key.startswith(f'{path}.') for key in KEYS)
    assert inside or path in KEYS, f'{name}: {path} is not a key'
    if value and path in KEYS and value.strip('…') and not value.isupper():
      is_number = re.fullmatch(r'[-\d.e]+|None|True|False', value)
      nested = ast.literal_eval(value) if is_number else value
      for part in reversed(path.split('.')):
        nested = {part: nested}
      config_lib.from_config_dict(nested)


@pytest.mark.parametrize('name', names(documents.PAGES))
def test_links_work_on_github(name):
  page = ROOT / name
  for link in documents.links(page):
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), f'{name}: {link}'
    assert not anchor or anchor in documents.anchors(target), f'{name}: {link}'


def test_targets_of_make_extras_and_modules_exist():
  text = '\n'.join(page.read_text() for page in documents.PAGES)
  targets = re.findall(r'(?m)^([\w-]+):', (ROOT / 'Makefile').read_text())
  assert set(re.findall(r'(?m)(?:^    |^|`)make ([a-z][\w-]*)', text)) <= {*targets}
  extras = re.findall(r"(?m)^    '(\w+)': \[", (ROOT / 'setup.py').read_text())
  assert set(','.join(re.findall(r'\.\[([\w,]+)\]', text)).split(',')) <= {*extras}
  for module in re.findall(r'python -m ((?:benchmarks|docs|farmer_jax|tests)\.[\w.]+\w)', text):
    assert (ROOT / (module.replace('.', '/') + '.py')).is_file(), module
  shared = (ROOT / 'benchmarks' / 'shared_flags.py').read_text()
  calls = re.findall(r'python -m benchmarks\.(\w+)((?:[^\n`#]|\\\n)*)', text)
  for module, arguments in calls:
    source = shared + (ROOT / 'benchmarks' / f'{module}.py').read_text()
    for flag in re.findall(r'--(\w+)', arguments):
      assert f"'{flag}'" in source, f'benchmarks.{module} --{flag}'


def test_references_have_all_keys_and_flags():
  from docs._site import config_reference

  page = config_reference.keys_page()
  assert [p for p in KEYS if f'{{#{p}}}' not in page] == []
  assert '`--config_help`' in config_reference.flags_page()


def test_links_are_adapted_to_the_site():
  pytest.importorskip('mkdocs')
  from docs._site import hooks

  def adapted(name, text):
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=name), meta={})
    return hooks.on_page_markdown(text, page)

  tour = adapted('tutorials/digits.md', '[a](../../notebooks/tour.ipynb) [b](photos.md#c) [d](#e)')
  assert tour == '[a](../notebooks/tour.md) [b](photos.md#c) [d](#e)'
  assert adapted('README.md', '[a](../configs/emoji.py)') == 'a'
  assert adapted('changelog.md', '![a](docs/b.png) [c](README.md)') == '![a](b.png) [c](README.md)'
  assert adapted('notebooks/tour.md', '![a](tour_0.png)') == '![a](tour_0.png)'


def test_broken_links_of_the_site_are_found(tmp_path):
  from docs._site import check_links

  (tmp_path / 'folder').mkdir()
  (tmp_path / 'folder' / 'b.html').write_text('<h1 id="b"></h1><a href="../a.html">a</a>')
  good = (
    '<a href="folder/b.html#b"></a><a href="https://arxiv.org/abs/1#x">c</a><a href="#i" id="i">'
  )
  (tmp_path / 'a.html').write_text(good)
  assert list(check_links.broken_links(tmp_path)) == []
  bad = ['b.html', 'folder/b.html#c', '#j', 'http://arxiv.org', 'https://arxiv', 'https://a.b/c d']
  elements = ''.join(f'<a href="{url}"></a>' for url in bad)
  (tmp_path / 'a.html').write_text(f'{elements}<script src="https://cdn.org/x.js"></script>')
  assert len(list(check_links.broken_links(tmp_path))) == len(bad) + 1


def test_notebook_and_its_source_have_the_same_cells():
  pytest.importorskip('jupytext')
  from docs._site import notebook

  def cells(content):
    return [(cell['id'], cell['cell_type'], ''.join(cell['source'])) for cell in content['cells']]

  file = ROOT / 'notebooks' / 'tour.ipynb'
  executed = json.loads(file.read_text())
  assert cells(executed) == cells(notebook.read(file.with_suffix('.py')))
  code = [cell for cell in executed['cells'] if cell['cell_type'] == 'code']
  assert [cell['execution_count'] for cell in code] == [*range(1, len(code) + 1)]
  assert file.stat().st_size < 1_500_000
  page, pictures = notebook.to_markdown(executed)
  assert len(pictures) >= 8 and all(f']({name})' in page for name in pictures)


@pytest.mark.slow
@pytest.mark.parametrize('pages', TUTORIALS, ids='+'.join)
def test_tutorials_run(pages, tmp_path):
  _link_repository(tmp_path)
  environment = processes.environment(devices=1)
  environment['PATH'] = f'{os.path.dirname(sys.executable)}:{environment["PATH"]}'
  (tmp_path / 'MY_PHOTOS').mkdir()
  for index, image in enumerate(np.random.default_rng(0).integers(256, size=(24, 40, 40, 3))):
    PIL.Image.fromarray(image.astype(np.uint8)).save(tmp_path / 'MY_PHOTOS' / f'{index}.png')
  marked = 0
  for page in pages:
    for block in documents.blocks(ROOT / 'docs' / 'tutorials' / f'{page}.md'):
      if block.run is not None:
        interpreter = {'bash': ['bash', '-euc'], 'python': [sys.executable, '-c']}[block.language]
        command = [*interpreter, f'{block.code.rstrip()} {block.run}'.rstrip()]
        done = subprocess.run(
          command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f'{block.code}\n{done.stderr[-3000:]}'
        marked += 1
  assert marked >= 2


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
  pytest.importorskip('nbclient')
  from docs._site import notebook

  _link_repository(tmp_path)
  (tmp_path / 'notebooks').unlink()
  (tmp_path / 'notebooks').mkdir()
  file = tmp_path / 'notebooks' / 'tour.py'
  file.write_text((ROOT / 'notebooks' / 'tour.py').read_text())
  monkeypatch.setenv('TOUR_STEPS', '40')
  # The kernel imports the packages of this process.
  monkeypatch.setenv('PATH', f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}')
  _, pictures = notebook.to_markdown(notebook.execute(file))
  assert len(pictures) >= 8
  assert (tmp_path / 'runs' / 'tour' / 'metrics.jsonl').exists()


def _link_repository(folder):
  """Fills a folder with links to the files of the repository, for commands that run in its root."""
  for name in os.listdir(ROOT):
    if name != 'runs':
      (folder / name).symlink_to(ROOT / name)
