"""The house has floors: imports point down only."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'farmer_jax'

# What a module may import of ours, by the first name below the package.
SUPPORT = {'checkpoints', 'distributed', 'workdir', 'xla', 'data', 'terminal', 'config', 'errors'}
ALLOWED = {
  'errors': set(),
  'config': {'config', 'errors'},
  'terminal': set(),
  'ops': {'ops'},
  'nn': {'nn', 'ops', 'config', 'errors'},
  'noise': {'ops', 'config'},
  'sampling': {'sampling', 'noise', 'nn', 'ops', *SUPPORT},
  'losses': {'sampling', 'noise', 'nn', 'ops', 'config', 'errors'},
  **dict.fromkeys(SUPPORT - {'terminal', 'config', 'errors'}, SUPPORT),
  'training': {'training', 'losses', 'noise', 'sampling', 'nn', 'ops', *SUPPORT},
  'evaluation': {'evaluation', 'losses', 'noise', 'sampling', 'nn', 'ops', *SUPPORT},
}
ALLOWED['api'] = set(ALLOWED) - {'training'}
ALLOWED['jobs'] = set(ALLOWED) | {'jobs'}
ALLOWED['main'] = {'jobs', *SUPPORT}
FILES = sorted(PACKAGE.rglob('*.py'))


def imports(tree):
  """Names of ours that a file imports, without the package's own."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'relative imports hide the direction'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    yield from (n.removeprefix('farmer_jax.') for n in names if n.startswith('farmer_jax.'))


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
  floor = file.relative_to(PACKAGE).parts[0].removesuffix('.py')
  for name in imports(ast.parse(file.read_text())):
    below = name.partition('.')[0]
    assert floor == '__init__' or below in ALLOWED[floor], f'{floor} may not import {name}'


def test_an_upward_import_would_be_found():
  found = list(imports(ast.parse('def f():\n  from farmer_jax.jobs import pretrain')))
  assert found == ['jobs.pretrain'] and 'jobs' not in ALLOWED['nn']


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_clu_and_tfds_need_tensorflow(file):
  for node in ast.walk(ast.parse(file.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module]
    assert not any(n.split('.')[0] in ('tensorflow', 'tensorboard') for n in names)
