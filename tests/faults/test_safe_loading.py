"""Loading untrusted files never runs code. Errors about unusable files are one line."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import tracemalloc

import numpy as np
import pytest

from farmer_jax import config as config_lib
from farmer_jax import errors, sampling, teacher
from farmer_jax.data import sources
from farmer_jax.distributed import mesh
from farmer_jax.evaluation import feature_networks, image_sets
from farmer_jax.sampling import to_disk
from farmer_jax.workdir import layout, results
from tests.support import command_line, config_values

pytestmark = pytest.mark.faults

CANARY = 'code_ran'
CODE = f"__import__('os').system('touch {CANARY}')"


class Hostile:
  """Creates a file when it is unpickled."""

  def __reduce__(self):
    return os.system, (f'touch {CANARY}',)


@pytest.fixture(autouse=True)
def _no_code_runs(tmp_path, monkeypatch):
  """Runs a test in an empty folder, and checks that no code from a file has run."""
  monkeypatch.chdir(tmp_path)
  yield
  assert not (tmp_path / CANARY).exists()


def test_unpickling_runs_the_code(tmp_path):
  """Checks that the other tests would detect code that runs."""
  pickle.loads(pickle.dumps(Hostile()))
  (tmp_path / CANARY).unlink()


def hostile_array():
  return np.array([Hostile()], dtype=object)


@contextlib.contextmanager
def refused(name):
  """Expects a `UserError` of one line that contains `name`."""
  with pytest.raises(errors.UserError) as caught:
    yield
  assert len(str(caught.value).splitlines()) == 1
  assert name in str(caught.value)


# config.json, read by configs/from_run.py.

CONFIGS = {
  'code as a number': {'seed': CODE},
  'code as a choice': {'job': CODE},
  'code as a section': {'model': CODE},
  'code as a key': {CODE: 1},
  'code in a list': {'data': {'image_size': [CODE]}},
  'code as a name': {'name': CODE},
  'parent folder': {'name': '../../elsewhere'},
  'parent folder for results': {'likelihood': {'name': '../../elsewhere'}},
  'absolute path for results': {'fidelity': {'name': '/tmp/elsewhere'}},
  'newline in a name': {'name': 'a\nb'},
  'newline in a key': {'a\nb': 1},
  'key of a million characters': {'x' * 10**6: 1},
  'value of a million characters': {'seed': 'x' * 10**6},
  'dunder key': {'__class__': 'str'},
  'nan': {'train': {'optimizer': {'learning_rate': float('nan')}}},
  'list': [1, 2],
  'null': None,
  # Contents of the file.
  'deep nesting': b'{"a":' * 10**5,
  'pickle': pickle.dumps(Hostile()),
  'integer of 100,000 digits': b'{"seed": ' + b'9' * 10**5 + b'}',
  'float overflow': b'{"noise": {"std_end": 1e999}}',
  'truncated': b'{"seed": ',
  'not UTF-8': bytes(range(128, 256)),
  'empty': b'',
}


@pytest.mark.parametrize('content', CONFIGS.values(), ids=CONFIGS)
def test_hostile_configuration_is_refused(content, tmp_path, capsys, monkeypatch):
  raw = content if isinstance(content, bytes) else json.dumps(content).encode()
  (tmp_path / 'config.json').write_bytes(raw)
  (tmp_path / 'config.py').write_text(f'import os\nos.mkdir({str(tmp_path / CANARY)!r})\n')
  outcome = command_line.run([f'--config=configs/from_run.py:{tmp_path}'], monkeypatch, capsys)
  monkeypatch.chdir(tmp_path)
  command_line.assert_user_error(outcome)
  assert len(outcome.err) < 1000


@pytest.mark.parametrize('path', ['data.path', 'teacher', 'sampling.labels', 'fidelity.weights'])
def test_code_in_a_string_stays_a_string(path, tmp_path, capsys, monkeypatch):
  values = config_values.nested({path: CODE}, config_lib.Config())
  (tmp_path / 'config.json').write_text(json.dumps(values))
  outcome = command_line.run([f'--config=configs/from_run.py:{tmp_path}'], monkeypatch, capsys)
  monkeypatch.chdir(tmp_path)
  assert outcome.code == 0, outcome.err
  assert config_lib.get(outcome.jobs[0][0], path) == CODE


# Names of classes and of results.


def test_class_names_are_not_paths(tmp_path):
  names = ['../../../elsewhere', '/tmp/elsewhere', CODE, '\0']
  (tmp_path / 'classes.json').write_text(json.dumps(names))
  read = layout.read_class_names(layout.absolute(tmp_path))
  assert list(read) == names
  config = config_lib.Config(
    sampling=config_lib.Sampling(labels='../../../elsewhere,/tmp/elsewhere')
  )
  assert sampling.parse_labels(config, read) == [0, 1]
  folder = to_disk.folder_name(config.sampling, 5)
  assert '/' not in folder and '\\' not in folder and len(folder) <= 150


MALFORMED_JSON = ('{', '5', '{"a": 1}', '[1, [2]]', '[' * 10**5, '{"config": 3, "step": 1}', '\0')


@pytest.mark.parametrize('text', MALFORMED_JSON)
def test_malformed_class_names_are_refused(text, tmp_path):
  (tmp_path / 'classes.json').write_text(text)
  with refused('classes.json'):
    layout.read_class_names(layout.absolute(tmp_path))


@pytest.mark.parametrize('text', MALFORMED_JSON)
def test_malformed_teacher_record_is_refused(text, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(config_lib.to_dict(config_lib.Config())))
  (tmp_path / 'teacher.json').write_text(text)
  with refused('teacher.json'):
    built = config_lib.Config(teacher=str(tmp_path))
    teacher.restore_teacher(built, tmp_path, mesh.LocalDevices())


@pytest.mark.parametrize('text', ['../' * 200, '/etc/passwd', 'a\0b', 'a\nb', CODE])
def test_names_of_results_are_file_names(text):
  name = layout.results_name(text, config_lib.Likelihood(source=text), set())
  assert (pathlib.Path('base') / name).parent == pathlib.Path('base')
  assert name.isprintable() and len(name) <= 150


# Arrays.


def test_shards_of_results_are_not_unpickled(tmp_path):
  np.savez(tmp_path / '00000.npz', arr_0=hostile_array())
  shards = results.ResultFiles(layout.absolute(tmp_path), {'images': 'arr_0'})
  assert len(shards) == 0


@pytest.mark.parametrize('kind', ['objects', 'pickle', 'npy', 'zip bomb', 'text', 'folder'])
def test_image_sets_are_not_unpickled(kind, tmp_path):
  file = tmp_path / 'images.npz'
  if kind in ('objects', 'folder'):
    np.savez(file, arr_0=hostile_array())
  elif kind == 'zip bomb':  # 100 MB in a file of 100 kB.
    np.savez_compressed(file, arr_0=np.zeros((10**8, 1), np.uint8))
  else:
    stream = io.BytesIO()
    np.save(stream, hostile_array(), allow_pickle=True)
    content = {'pickle': pickle.dumps(Hostile()), 'npy': stream.getvalue(), 'text': b'text'}
    file.write_bytes(content[kind])
  path = tmp_path if kind == 'folder' else file
  tracemalloc.start()
  with refused('images.npz'):
    image_sets.from_path(path, config_lib.Data())
  assert tracemalloc.get_traced_memory()[1] < 20e6
  tracemalloc.stop()


@pytest.mark.parametrize('member', ['arr_1', 'mu', 'sigma'])
def test_other_arrays_of_an_image_set_are_not_unpickled(member, tmp_path):
  """The images in the file are valid. The labels or statistics are hostile."""
  arrays = {'arr_0': np.zeros((12, 4, 4, 1), np.uint8), 'mu': np.zeros(3), 'sigma': np.eye(3)}
  file = tmp_path / 'images.npz'
  np.savez(file, **arrays | {member: hostile_array()})
  with refused('images.npz'):
    if member == 'arr_1':
      image_sets.from_path(file, config_lib.Data())
    else:
      config = config_lib.Config(fidelity=config_lib.Fidelity(reference=str(file)))
      feature_networks.load_reference(config, None, layout.absolute(tmp_path))


# Images.


@pytest.mark.parametrize('name', ['evil.png', 'evil.jpg', 'evil.webp', 'evil.bmp'])
def test_pickles_with_names_of_images_are_refused(name, tmp_path):
  folder = tmp_path / 'images'
  folder.mkdir()
  for number in range(2):
    (folder / f'{number}{name}').write_bytes(pickle.dumps(Hostile()))
  data = config_lib.Data(source='folder', path=str(folder), num_classes=0, valid_fraction=0.0)
  with refused(name):
    sources.load(data, 'train').gather(np.arange(2))
