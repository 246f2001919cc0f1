"""Rules for the source code of the package, checked on its syntax trees."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'farmer_jax'
# Without exports/torch_farmer.py, a link to an example that does not use this package.
FILES = [file for file in sorted(PACKAGE.rglob('*.py')) if not file.is_symlink()]
SOURCES = {str(file.relative_to(PACKAGE)): file.read_text() for file in FILES}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}

MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 400

# The modules of this package that a module may import, by the first name below the package.
SUPPORT = {'checkpoints', 'config', 'data', 'distributed', 'errors', 'exports', 'terminal'}
SUPPORT |= {'workdir', 'xla'}
NUMERICS = {'losses', 'nn', 'noise', 'ops', 'sampling'}
ALLOWED = {
  **dict.fromkeys(('checkpoints', 'data', 'distributed', 'exports', 'workdir', 'xla'), SUPPORT),
  'errors': set(),
  'terminal': set(),
  'config': {'config', 'errors'},
  'configs': {'config', 'configs', 'errors', 'workdir'},
  'ops': {'ops', 'config'},
  'nn': {'nn', 'ops', 'config', 'errors'},
  'noise': {'ops', 'config', 'errors'},
  'sampling': {'sampling', 'noise', 'nn', 'ops', *SUPPORT},
  'losses': {'sampling', 'noise', 'nn', 'ops', 'config', 'errors'},
  'training': {'training', *NUMERICS, *SUPPORT},
  'evaluation': {'evaluation', *NUMERICS, *SUPPORT},
  'teacher': {*NUMERICS, *SUPPORT},
  'api': {'evaluation', 'teacher', *NUMERICS, *SUPPORT},
  'jobs': {'api', 'evaluation', 'jobs', 'teacher', 'training', *NUMERICS, *SUPPORT},
  'main': {'jobs', *SUPPORT},
  '__init__': {'api'},
}

# The only files that may use private modules of a library. Each file names the library's version.
PRIVATE_IMPORTS = {'checkpoints/orbax_internals.py'}

# The only file, if any, that may import a package or call a function. Serializers, interpreters and
# the functions can run code from a file. TensorFlow, PyTorch, tqdm and wandb must stay unnecessary
# or replaceable. The names of the jobs in jobs/__init__.py come from the choices of config.job.
SERIALIZERS = ('cloudpickle', 'dill', 'joblib', 'marshal', 'pickle', 'shelve', 'yaml')
INTERPRETERS = ('code', 'pty', 'runpy', 'subprocess')
RESTRICTED_PACKAGES = {
  **dict.fromkeys((*SERIALIZERS, *INTERPRETERS, 'tensorboard', 'tensorflow')),
  'torch': 'evaluation/convert_inception.py',
  'tqdm': 'terminal.py',
  'wandb': 'workdir/tracker.py',
}
RESTRICTED_CALLS = {
  **dict.fromkeys(('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen')),
  **dict.fromkeys(('np.fromfile', 'np.memmap', 'jnp.load')),
  'importlib.import_module': 'jobs/__init__.py',
}


def imported(tree):
  """Yields the dotted names that a module imports."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'use absolute imports'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def calls(tree):
  """Returns (source of the function, call) for all calls."""
  return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def allows_pickle(call):
  """Whether a call sets `allow_pickle` to anything but False."""
  values = [keyword.value for keyword in call.keywords if keyword.arg == 'allow_pickle']
  return any(not isinstance(value, ast.Constant) or value.value for value in values)


def upward_imports(name, tree):
  layer = name.partition('/')[0].removesuffix('.py')
  ours = (n.removeprefix('farmer_jax.') for n in imported(tree) if n.startswith('farmer_jax.'))
  return [n for n in ours if n.partition('.')[0] not in ALLOWED[layer]]


def restricted_imports(name, tree):
  packages = (n.partition('.')[0] for n in imported(tree))
  return [p for p in packages if RESTRICTED_PACKAGES.get(p, name) != name]


def restricted_calls(name, tree):
  return [
    f for f, call in calls(tree) if RESTRICTED_CALLS.get(f, name) != name or allows_pickle(call)
  ]


def private_imports(name, tree):
  theirs = (n for n in imported(tree) if not n.startswith(('farmer_jax.', '__future__')))
  private = [n for n in theirs if any(part.startswith('_') for part in n.split('.'))]
  return [] if name in PRIVATE_IMPORTS else private


def prints(name, tree):
  allowed = name in ('main.py', 'terminal.py')
  return [] if allowed else [function for function, _ in calls(tree) if function == 'print']


def long_functions(_, tree):
  functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
  return [f.name for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES]


def long_files(name, _):
  lines = SOURCES.get(name, '').count('\n')
  return [lines] if lines > MAX_FILE_LINES else []


RULES = [upward_imports, restricted_imports, restricted_calls, private_imports, prints]
RULES += [long_functions, long_files]


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_package_follows_the_rules(rule):
  violations = {name: rule(name, tree) for name, tree in TREES.items()}
  assert not {name: found for name, found in violations.items() if found}


def test_configs_follow_the_rules():
  for file in (ROOT / 'configs').glob('*.py'):
    tree = ast.parse(file.read_text())
    assert not upward_imports('configs', tree)
    assert not restricted_imports(file.name, tree)
    assert not restricted_calls(file.name, tree)


def test_private_imports_are_needed():
  assert {name for name in PRIVATE_IMPORTS if '._src' in SOURCES[name]} == PRIVATE_IMPORTS


@pytest.mark.parametrize(
  ('rule', 'code'),
  [
    (upward_imports, 'def f():\n  from farmer_jax.jobs import pretrain'),
    (upward_imports, 'import farmer_jax.training.loop'),
    (restricted_imports, 'import pickle'),
    (restricted_imports, 'from yaml import load'),
    (restricted_imports, 'from tqdm import tqdm'),
    (restricted_calls, 'eval(x)'),
    (restricted_calls, 'os.system(x)'),
    (restricted_calls, 'np.load(x, allow_pickle=y)'),
    (private_imports, 'from jax._src import core'),
    (prints, 'print(1)'),
    (long_functions, 'def f():\n' + '  pass\n' * 60),
  ],
)
def test_rules_find_violations(rule, code):
  assert rule('nn/file.py', ast.parse(code))
  assert not rule('nn/file.py', ast.parse('import numpy as np\nnp.load(x, allow_pickle=False)'))
