"""Files from others are data: nothing in them runs, and what is wrong with them takes one line."""

import ast
import io
import json
import os
import pathlib
import pickle
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from farmer_jax import api
from farmer_jax import config as config_lib
from farmer_jax.data import sources
from farmer_jax.errors import ConfigError
from farmer_jax.evaluation import torch_weights
from farmer_jax.jobs import fidelity, sample
from farmer_jax.workdir import layout, results
from tests.faults.test_config_fuzz import command_line

ROOT = pathlib.Path(__file__).parents[2]
CANARY = 'harmed'


class Hostile:
  """Leaves a file where it is unpickled."""

  def __reduce__(self):
    return os.system, (f'touch {CANARY}',)


@pytest.fixture(autouse=True)
def _harmless(tmp_path, monkeypatch):
  """Runs a test in a folder of its own, which nothing may have been left in."""
  monkeypatch.chdir(tmp_path)
  yield
  assert not (tmp_path / CANARY).exists()


def test_the_payload_works_where_nothing_holds_it_back(tmp_path):
  pickle.loads(pickle.dumps(Hostile()))
  (tmp_path / CANARY).unlink()  # raises if it is not there


def write_npz(file, compress=False, **arrays):
  (np.savez_compressed if compress else np.savez)(file, **arrays)
  return file


def objects():
  """An array whose loading would unpickle a payload."""
  return np.array([Hostile()], dtype=object)


def one_line(caught):
  message = str(caught.value)
  assert len(message.splitlines()) == 1
  return message


# The code itself.

FORBIDDEN_MODULES = {
  'pickle',
  'marshal',
  'shelve',
  'dill',
  'cloudpickle',
  'joblib',
  'yaml',
  'torch',
}
FORBIDDEN_MODULES |= {'subprocess', 'pty', 'commands', 'code', 'runpy'}
FORBIDDEN_CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen'}
FORBIDDEN_CALLS |= {'importlib.import_module', 'np.fromfile', 'np.memmap', 'jnp.load'}

# What is called in spite of that, by file: the job is one of a few names, which `config` checks.
ALLOWED_CALLS = {('jobs/__init__.py', 'importlib.import_module')}


def dubious(tree, name):
  """What a module should not use, as text."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or '']
    else:
      names = []
    yield from (n for n in names if n.partition('.')[0] in FORBIDDEN_MODULES)
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      if called in FORBIDDEN_CALLS and (name, called) not in ALLOWED_CALLS:
        yield called
      pickles = [k for k in node.keywords if k.arg == 'allow_pickle']
      if any(not isinstance(k.value, ast.Constant) or k.value.value for k in pickles):
        yield ast.unparse(node)


def test_nothing_in_the_code_runs_what_it_reads():
  found = {}
  for folder in ('farmer_jax', 'configs'):
    for file in (ROOT / folder).rglob('*.py'):
      name = str(file.relative_to(ROOT / folder))
      uses = list(dubious(ast.parse(file.read_text()), name))
      if uses:
        found[name] = uses
  assert not found


@pytest.mark.parametrize(
  'code',
  [
    'import pickle',
    'from yaml import load',
    'eval(x)',
    'os.system(x)',
    'np.load(x, allow_pickle=y)',
  ],
)
def test_the_search_of_the_code_finds_something(code):
  assert list(dubious(ast.parse(code), 'file.py'))


# A run's configuration, read by configs/from_run.py.

CODE = f"__import__('os').system('touch {CANARY}')"

CONFIGS = {
  'code for a number': {'seed': CODE},
  'code for a choice': {'job': CODE},
  'code for a section': {'model': CODE},
  'code for a key': {CODE: 1},
  'code for a list': {'data': {'image_size': [CODE]}},
  'code for a name': {'name': CODE},
  'another folder': {'name': '../../elsewhere'},
  'the root': {'name': '/tmp/elsewhere'},
  'another folder for results': {'likelihood': {'name': '../../elsewhere'}},
  'another folder for figures': {'fidelity': {'name': '/tmp/elsewhere'}},
  'lines in a name': {'name': 'a\nb'},
  'lines in a key': {'a\nb': 1},
  'an endless key': {'x' * 10**6: 1},
  'an endless value': {'seed': 'x' * 10**6},
  'a method': {'__class__': 'str'},
  'not a number': {'train': {'optimizer': {'learning_rate': float('nan')}}},
  'endless': {'noise': {'std_end': float('inf')}},
  'minus endless': {'noise': {'std_end': -float('inf')}},
  'an enormous float': {'noise': {'std_end': 10**400}},
  'an enormous integer': {'train': {'batch_size': 10**400}},
  'a negative size': {'data': {'image_size': -8}},
  'a list': [1, 2],
  'nothing': None,
}

RAW_CONFIGS = {
  'nested without end': b'{"a":' * 10**5,
  'a pickle': pickle.dumps(Hostile()),
  'digits without end': b'{"seed": ' + b'9' * 10**5 + b'}',
  'a float beyond all': b'{"noise": {"std_end": 1e999}}',
  'half a file': b'{"seed": ',
  'no text': bytes(range(128, 256)),
  'empty': b'',
}


@pytest.mark.parametrize('name', [*CONFIGS, *RAW_CONFIGS])
def test_a_runs_configuration_is_data(name, tmp_path, capsys, monkeypatch):
  run = tmp_path / 'run'
  run.mkdir()
  raw = RAW_CONFIGS.get(name) or json.dumps(CONFIGS.get(name)).encode()
  (run / 'config.json').write_bytes(b'' if name == 'empty' else raw)
  (run / 'config.py').write_text(f'import os\nos.mkdir({str(tmp_path / CANARY)!r})\n')
  code, out, err, calls = command_line([f'--config=configs/from_run.py:{run}'], monkeypatch, capsys)
  monkeypatch.chdir(tmp_path)
  assert code == 1 and not calls and not out
  assert err.startswith('error: ') and len(err.splitlines()) == 1
  assert 'Traceback' not in err and len(err) < 1000


@pytest.mark.parametrize('path', ['data.path', 'teacher', 'sampling.labels', 'fidelity.weights'])
def test_code_in_a_path_or_a_label_stays_text(path, tmp_path, capsys, monkeypatch):
  values = config_lib.to_dict(config_lib.Config())
  *sections, key = path.split('.')
  node = values
  for section in sections:
    node = node[section]
  node[key] = CODE
  (tmp_path / 'config.json').write_text(json.dumps(values))
  arguments = [f'--config=configs/from_run.py:{tmp_path}']
  code, _, err, calls = command_line(arguments, monkeypatch, capsys)
  monkeypatch.chdir(tmp_path)
  assert code == 0, err
  assert config_lib.get(calls[0][0], path) == CODE


# Class names and the names of results.


def test_names_of_classes_name_no_files(tmp_path):
  """They are shown, and compared with labels: a way to another folder is text as any other."""
  names = ['../../../elsewhere', '/tmp/elsewhere', CODE, '\0']
  (tmp_path / 'classes.json').write_text(json.dumps(names))
  read = layout.read_class_names(layout.absolute(tmp_path))
  assert list(read) == names
  config = config_lib.Config(
    sampling=config_lib.Sampling(labels='../../../elsewhere,/tmp/elsewhere')
  )
  assert sample.parse_labels(config, read) == [0, 1]
  folder = sample.folder_name(config.sampling, 5)
  assert '/' not in folder and '\\' not in folder and len(folder) <= 150


JSON = ('{', '5', '{"a": 1}', '[1, [2]]', '[' * 10**5, '{"config": 3, "step": 1}', '\0')


@pytest.mark.parametrize('text', JSON)
def test_a_damaged_list_of_classes_takes_one_line(text, tmp_path):
  (tmp_path / 'classes.json').write_text(text)
  with pytest.raises(ConfigError, match='classes.json') as caught:
    layout.read_class_names(layout.absolute(tmp_path))
  one_line(caught)


@pytest.mark.parametrize('text', JSON)
def test_a_damaged_note_of_the_teacher_takes_one_line(text, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(config_lib.to_dict(config_lib.Config())))
  (tmp_path / 'teacher.json').write_text(text)
  with pytest.raises(ConfigError, match='teacher.json') as caught:
    api.load_teacher(config_lib.Config(teacher=str(tmp_path)), tmp_path, None)
  one_line(caught)


@pytest.mark.parametrize('text', ['../' * 200, '/etc/passwd', 'a\0b', 'a\nb', CODE])
def test_names_of_results_lead_nowhere_else(text):
  settings = config_lib.Likelihood(source=text)
  name = layout.results_name(text, settings, set())
  assert (pathlib.Path('base') / name).parent == pathlib.Path('base')
  assert name.isprintable() and len(name) <= 150


# Arrays.


def test_shards_of_samples_are_not_unpickled(tmp_path, capsys):
  folder = layout.absolute(tmp_path / 'samples')
  folder.mkdir()
  write_npz(tmp_path / 'samples' / '00000.npz', arr_0=objects())
  store = results.Shards(folder, {'images': 'arr_0'})
  assert len(store) == 0
  assert 'is damaged' in ''.join(capsys.readouterr())


@pytest.mark.parametrize('kind', ['objects', 'pickle', 'npy', 'bomb', 'text', 'folder of them'])
def test_images_to_compare_are_not_unpickled(kind, tmp_path):
  file = tmp_path / 'images.npz'
  if kind in ('objects', 'folder of them'):
    write_npz(file, arr_0=objects())
  elif kind == 'bomb':  # Many elements in a few bytes.
    write_npz(file, compress=True, arr_0=np.zeros((10**8, 1), np.uint8))
  else:
    stream = io.BytesIO()
    np.save(stream, objects(), allow_pickle=True)
    content = {'pickle': pickle.dumps(Hostile()), 'npy': stream.getvalue(), 'text': b'text'}[kind]
    file.write_bytes(content)
  path = tmp_path if kind == 'folder of them' else file
  tracemalloc.start()
  with pytest.raises(ConfigError) as caught:
    fidelity.ImageSet.open(path, config_lib.Config())
  assert tracemalloc.get_traced_memory()[1] < 20e6
  tracemalloc.stop()
  assert 'images.npz' in one_line(caught)


@pytest.mark.parametrize('member', ['arr_1', 'mu', 'sigma'])
def test_no_array_of_a_file_is_unpickled(member, tmp_path):
  """Labels and statistics beside sound images."""
  arrays = {'arr_0': np.zeros((12, 4, 4, 1), np.uint8), 'mu': np.zeros(3), 'sigma': np.eye(3)}
  file = write_npz(tmp_path / 'images.npz', **arrays | {member: objects()})
  with pytest.raises(ConfigError) as caught:
    if member == 'arr_1':
      fidelity.ImageSet.open(file, config_lib.Config())
    else:
      config = config_lib.Config(fidelity=config_lib.Fidelity(reference=str(file)))
      fidelity.load_reference(config, None, tmp_path)
  assert 'images.npz' in one_line(caught)


# Images.


@pytest.mark.parametrize('name', ['evil.png', 'evil.jpg', 'evil.webp', 'evil.bmp'])
def test_an_image_that_is_a_pickle_is_refused(name, tmp_path):
  folder = tmp_path / 'images'
  folder.mkdir()
  for number in range(2):
    (folder / f'{number}{name}').write_bytes(pickle.dumps(Hostile()))
  data = config_lib.Data(source='folder', path=str(folder), num_classes=0, valid_fraction=0.0)
  with pytest.raises(ConfigError) as caught:
    source = sources.load(data, 'train')
    source.gather(np.arange(2))
  assert name in one_line(caught)


# PyTorch's weights, more of which stands in tests/evaluation/test_torch_weights.py.


def weights(pickled, compression=zipfile.ZIP_STORED, extra=()):
  """A file as torch.save writes it."""
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', pickled)
    for name, content in extra:
      archive.writestr(name, content)
  return stream.getvalue()


def many_tensors(entries, tensors):
  """A pickled dict of tensors that all have the same arguments, with superfluous entries."""
  storage = b'(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0' + b'0X\3\0\0\0cpuK\1tQ'
  arguments = (
    b'(' + storage + b'K\0))\x89ccollections\nOrderedDict\n)R' + b'K\0' * entries + b'tq\0'
  )
  rebuilt = b'ctorch._utils\n_rebuild_tensor_v2\nh\0R'
  items = b''.join(b'X\5\0\0\0%05d' % number + rebuilt for number in range(tensors))
  return b'\x80\x02' + arguments + b'}(' + items + b'u.'


def test_weights_cannot_keep_their_reader_busy(tmp_path):
  """A tuple of 400,000 zeros is made once and then looked at for each of 20,000 tensors: 8e9
  entries, were they all read."""
  file = tmp_path / 'weights.pth'
  file.write_bytes(weights(many_tensors(1, 3), extra=[('archive/data/0', bytes(4))]))
  assert len(torch_weights.read(file)) == 3
  file.write_bytes(weights(many_tensors(400_000, 20_000), extra=[('archive/data/0', bytes(4))]))
  start = time.monotonic()
  with pytest.raises(ConfigError) as caught:
    torch_weights.read(file)
  assert time.monotonic() - start < 20
  assert 'weights.pth' in one_line(caught)


def test_compressed_weights_do_not_unfold(tmp_path):
  file = tmp_path / 'weights.pth'
  bomb = [('archive/data/0', bytes(10**8))]
  file.write_bytes(weights(b'\x80\x02}.', zipfile.ZIP_DEFLATED, bomb))
  assert file.stat().st_size < 1e6
  tracemalloc.start()
  with pytest.raises(ConfigError) as caught:
    torch_weights.read(file)
  assert tracemalloc.get_traced_memory()[1] < 20e6
  tracemalloc.stop()
  one_line(caught)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_weights_are_not_unpickled(protocol, tmp_path):
  for content in (Hostile(), {'weight': Hostile()}, [Hostile()] * 3):
    file = tmp_path / 'weights.pth'
    pickled = pickle.dumps(content, protocol)
    for raw in (pickled, weights(pickled)):
      file.write_bytes(raw)
      with pytest.raises(ConfigError) as caught:
        torch_weights.read(file)
      one_line(caught)
