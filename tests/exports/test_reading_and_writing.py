"""The files of exports: names, several files, damaged files, and folders that are not exports."""

import contextlib
import json

import jax
import numpy as np
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy

from farmer_jax import errors, exports
from farmer_jax.workdir import layout
from tests.support import exports as support
from tests.support import runs

CONFIG = runs.CONFIG
BLOCK = ('in_proj.kernel', 'in_proj.bias', 'positions', 'norm.scale', 'shift_proj.kernel')
BLOCK += ('shift_proj.bias', 'log_scale_proj.kernel', 'log_scale_proj.bias')
LAYER = ('attention_norm.scale', 'query.kernel', 'key.kernel', 'value.kernel', 'mlp_norm.scale')
LAYER += ('attention_out.kernel', 'mlp_in.kernel', 'mlp_out.kernel')
HEAD = ('logits.kernel', 'logits.bias', 'means.kernel', 'means.bias', 'norm.scale')
HEAD += ('log_scales.kernel', 'log_scales.bias')
NAMES = {
  *(f'flow.block_{t}.{name}' for t in range(2) for name in BLOCK),
  *(f'flow.block_{t}.layer_0.{name}' for t in range(2) for name in LAYER),
  *(f'prior.layer_0.{name}' for name in LAYER),
  *('prior.class_embedding.embedding', 'prior.positions', 'prior.in_proj.kernel'),
  *(f'prior.{head}_head.{name}' for head in ('informative', 'redundant') for name in HEAD),
  'prior.in_proj.bias',
}


@pytest.fixture(scope='module')
def params():
  return runs.random_parameters(CONFIG)


@pytest.fixture
def folder(params, tmp_path):
  return support.write(layout.absolute(tmp_path / 'export'), CONFIG, params)


def abstract(params):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)


def assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_names_shapes_and_metadata_of_the_tensors(folder, params):
  with safetensors.safe_open(str(folder / 'model.safetensors'), 'numpy') as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert file.metadata()['step'] == '3' and file.metadata()['parameters'] == 'ema_params'
    assert file.metadata()['farmer_jax_version']
  assert set(tensors) == NAMES
  assert {a.dtype for a in tensors.values()} == {np.dtype('float32')}
  stack = params['flow']['stack']
  expected = stack['transformer']['stack']['query']['kernel'][1, 0]
  np.testing.assert_array_equal(tensors['flow.block_1.layer_0.query.kernel'], expected)
  np.testing.assert_array_equal(tensors['flow.block_1.positions'], stack['positions'][1])
  assert (folder / 'model.safetensors').stat().mode & 0o44


def test_restored_parameters_are_equal(folder, params):
  assert_equal(exports.restore_params(folder, params), params)
  assert_equal(exports.restore_params(folder / 'model.safetensors', abstract(params)), params)
  # A part of the parameters, in another dtype.
  half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, 'bfloat16'), params['prior'])
  found = exports.restore_params(str(folder), {'prior': half})
  expected = jax.tree.map(lambda a: a.astype('bfloat16'), params['prior'])
  assert_equal(found, {'prior': expected})
  assert exports.read_config(folder) == CONFIG


@pytest.mark.parametrize('max_bytes', [3000, 20_000])
def test_several_files(params, tmp_path, max_bytes):
  folder = support.write(layout.absolute(tmp_path / 'export'), CONFIG, params, max_bytes)
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  files = sorted(folder.glob('*.safetensors'))
  assert files[0].name == f'model-00001-of-{len(files):05d}.safetensors' and len(files) > 2
  assert set(index['weight_map']) == NAMES
  total = 0
  for file in files:
    arrays = safetensors_numpy.load_file(str(file))
    sizes = [a.nbytes for a in arrays.values()]
    assert sum(sizes) <= max_bytes or len(sizes) == 1
    assert all(index['weight_map'][name] == file.name for name in arrays)
    total += sum(sizes)
  assert index['metadata']['total_size'] == total == sum(a.nbytes for a in jax.tree.leaves(params))
  assert_equal(exports.restore_params(folder, abstract(params)), params)


def test_a_newer_export_replaces_the_files_and_keeps_others(params, tmp_path):
  folder = layout.absolute(tmp_path / 'export')
  folder.mkdir()  # An empty folder is no obstacle.
  support.write(folder, CONFIG, params, max_bytes=3000)
  (folder / '.gitattributes').write_text('mine')
  doubled = jax.tree.map(lambda a: 2 * a, params)
  support.write(folder, CONFIG, doubled)
  names = {file.name for file in folder.iterdir()}
  assert names == {'.gitattributes', 'config.json', 'model.safetensors'}
  assert_equal(exports.restore_params(folder, abstract(params)), doubled)
  assert [file.name for file in folder.parent.iterdir()] == ['export']


@pytest.mark.parametrize('older', [False, True])
def test_a_failed_export_is_not_an_export(params, tmp_path, monkeypatch, older):
  folder, calls = layout.absolute(tmp_path / 'export'), []
  if older:
    support.write(folder, CONFIG, params)
  save = safetensors_numpy.save_file

  def fail(arrays, file, metadata):
    calls.append(file)
    if len(calls) == 2:
      raise OSError(28, 'No space left on device')
    save(arrays, file, metadata)

  monkeypatch.setattr(safetensors_numpy, 'save_file', fail)
  doubled = jax.tree.map(lambda a: 2 * a, params)
  with refused(errors.WorkdirError, 'No space left', 'config.export.path'):
    support.write(folder, CONFIG, doubled, max_bytes=3000)
  assert [file.name for file in folder.parent.iterdir()] == ['export'][: int(older)]
  if older:
    assert_equal(exports.restore_params(folder, abstract(params)), params)


def test_remains_of_a_killed_export_are_removed(params, tmp_path):
  remains = tmp_path / '.export.partial'
  remains.mkdir()
  (remains / 'model-00009-of-00009.safetensors').write_bytes(b'x')
  support.write(layout.absolute(tmp_path / 'export'), CONFIG, params)
  assert not remains.exists()
  assert len(list((tmp_path / 'export').iterdir())) == 2


@contextlib.contextmanager
def refused(error, *texts):
  """Expects an error of one line that contains all texts."""
  with pytest.raises(error) as caught:
    yield
  message = str(caught.value)
  assert '\n' not in message and all(text in message for text in texts), message


def test_other_folders_are_not_overwritten(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{}')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'thesis.txt').write_text('years of work')
  (tmp_path / 'file').write_text('x')
  for name in ('run', 'other', 'file'):
    with refused(errors.WorkdirError, name, 'config.export.path'):
      exports.check_folder(tmp_path / name)
  with refused(errors.WorkdirError, 'a[b]'):
    exports.check_folder(tmp_path / 'a[b]')


def test_a_file_that_cannot_be_read(folder, params):
  weights = folder / 'model.safetensors'
  content = weights.read_bytes()
  for damaged in (content[:-100], content[:50], b''):
    weights.write_bytes(damaged)
    with refused(errors.CheckpointError, str(folder)):
      exports.restore_params(folder, params)
  weights.unlink()
  with refused(errors.CheckpointError, str(folder)):
    exports.restore_params(folder, params)


def test_a_missing_file_of_several(params, tmp_path):
  folder = support.write(layout.absolute(tmp_path / 'export'), CONFIG, params, 20_000)
  first, second, *_ = sorted(folder.glob('*.safetensors'))
  second.write_bytes(first.read_bytes())
  with refused(errors.CheckpointError, str(folder)):
    exports.restore_params(folder, params)
  second.unlink()
  with refused(errors.CheckpointError, second.name):
    exports.restore_params(folder, params)


@pytest.mark.parametrize('weight_map', [{'x': '../elsewhere.safetensors'}, {'x': 3}, [], None])
def test_hostile_index(folder, params, weight_map):
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
  with refused(errors.WorkdirError, 'index.json'):
    exports.restore_params(folder, params)


def test_parameters_of_another_model(folder, params):
  kernel = params['prior']['in_proj']['kernel']
  wider = jax.ShapeDtypeStruct((kernel.shape[0], 99), kernel.dtype)
  cases = [
    ({'prior': {'in_proj': {'kernel': wider}}}, 'prior.in_proj.kernel', '99'),
    ({'prior': {'rope': kernel}}, 'prior.rope', 'no'),
  ]
  positions = params['flow']['stack']['positions']
  for size, name in ((1, 'also has flow.block_1'), (3, 'no flow.block_2')):
    other = jax.ShapeDtypeStruct((size, *positions.shape[1:]), positions.dtype)
    cases.append(({'flow': {'stack': {'positions': other}}}, name))
  for target, *texts in cases:
    with refused(errors.CheckpointError, 'another model', *texts):
      exports.restore_params(folder, target)


@pytest.mark.parametrize(
  'change',
  [
    {'export_format': 2},
    {'export_format': 'x' * 10**6},
    {'config': 3},
    {'class_names': [1]},
    {'class_names': None},
    {'step': '3'},
  ],
)
def test_invalid_record(folder, change):
  record = support.record(CONFIG) | change
  (folder / 'config.json').write_text(json.dumps(record))
  with refused(errors.WorkdirError, 'config.json'):
    exports.read_config(folder)
  with refused(errors.WorkdirError, 'config.json'):
    layout.read_class_names(folder)
