"""Files that PyTorch wrote, files that were made by hand, damaged and hostile ones."""

import builtins
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from farmer_jax import errors
from farmer_jax.evaluation import torch_weights

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'int': 4}}
NUMBERS = np.arange(12, dtype=np.float32)


def plain(value):
  """The opcodes that leave a plain value on the stack."""
  return pickle.dumps(value, 2)[2:-1]


def storage_id(key='0', kind=b'torch\nFloatStorage', count=12, view=None):
  extra = b'' if view is None else plain(view)
  parts = plain('storage') + b'c' + kind + b'\n' + plain(key) + plain('cpu') + plain(count)
  return b'(' + parts + extra + b't'


def tensor(
  identity=None, offset=0, shape=(3, 4), strides=(4, 1), hooks=b'ccollections\nOrderedDict\n)R'
):
  """The opcodes of a tensor, as torch.save writes them."""
  arguments = plain(offset) + plain(shape) + plain(strides) + b'\x89' + hooks
  identity = storage_id() if identity is None else identity
  return b'ctorch._utils\n_rebuild_tensor_v2\n(' + identity + b'Q' + arguments + b'tR'


def state_dict(**entries):
  """A pickle of an OrderedDict with the attribute that PyTorch gives it."""
  items = b''.join(plain(name) + value for name, value in entries.items())
  attributes = b'}' + plain('_metadata') + b'}s'
  return b'\x80\x02ccollections\nOrderedDict\n)R(' + items + b'u' + attributes + b'b.'


def as_stream(pickled, storages=(('0', NUMBERS),), system=SYSTEM):
  """The format before torch 1.6."""
  head = [pickle.dumps(value, 2) for value in (MAGIC, 1001, system)]
  keys = pickle.dumps([key for key, _ in storages], 2)
  data = [len(array).to_bytes(8, 'little') + array.tobytes() for _, array in storages]
  return b''.join([*head, pickled, keys, *data])


def as_zip(pickled, storages=(('0', NUMBERS),), compression=zipfile.ZIP_STORED, extra=()):
  """The format since torch 1.6."""
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', pickled)
    for key, array in storages:
      archive.writestr(f'archive/data/{key}', array.tobytes())
    for name, content in extra:
      archive.writestr(name, content)
  return stream.getvalue()


FORMATS = pytest.mark.parametrize('container', [as_stream, as_zip])


@pytest.fixture
def read(tmp_path):
  """Reads bytes as a file."""

  def read(content):
    (tmp_path / 'weights.pth').write_bytes(content)
    return torch_weights.read(str(tmp_path / 'weights.pth'))

  return read


@pytest.fixture
def refused(read):
  """Asserts that bytes are refused in one line of a reasonable length; returns it."""

  def refused(content):
    with pytest.raises(errors.ConfigError) as caught:
      read(content)
    message = str(caught.value)
    assert '\n' not in message and len(message) < 400
    return message

  return refused


@FORMATS
def test_reads_tensors_and_views(read, container):
  found = read(
    container(
      state_dict(
        whole=tensor(),
        transposed=tensor(offset=1, shape=(2, 3), strides=(1, 4)),
        scalar=tensor(offset=11, shape=(), strides=()),
        empty=tensor(shape=(0, 5), strides=(5, 1)),
      )
    )
  )
  assert list(found) == ['whole', 'transposed', 'scalar', 'empty']
  np.testing.assert_array_equal(found['whole'], NUMBERS.reshape(3, 4))
  np.testing.assert_array_equal(found['transposed'], [[1, 5, 9], [2, 6, 10]])
  assert found['scalar'] == 11 and found['scalar'].shape == ()
  assert found['empty'].shape == (0, 5)
  assert all(array.dtype == np.float32 for array in found.values())
  with pytest.raises(ValueError):
    found['whole'][:] = 0


@FORMATS
def test_reads_what_pytorch_writes(tmp_path, container):
  torch = pytest.importorskip('torch', exc_type=ImportError)
  generator = torch.Generator().manual_seed(0)
  base = torch.randn(5, 6, 7, generator=generator)
  tensors = {
    'single': base,
    'transposed': base.transpose(0, 2),
    'part': base[1:4, ::2, 3],
    'double': base.double(),
    'half': base.half(),
    'count': torch.tensor(2**40 + 1),
    'int': base.mul(100).int(),
    'byte': torch.arange(200, dtype=torch.uint8),
    'none': torch.zeros(0, 3),
  }
  module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  path = tmp_path / 'weights.pth'
  for saved in (tensors, module.state_dict()):
    torch.save(saved, path, _use_new_zipfile_serialization=container is as_zip)
    found = torch_weights.read(path)
    assert list(found) == list(saved)
    for name, expected in saved.items():
      assert found[name].dtype == expected.numpy().dtype
      np.testing.assert_array_equal(found[name], expected.numpy())


class Hostile:
  """Pickles to a call."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@FORMATS
@pytest.mark.parametrize('how', ['system', 'eval', 'open', 'entry'])
def test_hostile_pickles_are_refused_and_do_nothing(refused, tmp_path, monkeypatch, container, how):
  monkeypatch.chdir(tmp_path)
  payload = {
    'system': Hostile(os.system, 'touch harmed'),
    'eval': Hostile(builtins.eval, "open('harmed', 'w')"),
    'open': Hostile(builtins.open, 'harmed', 'w'),
    'entry': {'weight': Hostile(os.mkdir, 'harmed')},
  }[how]
  for protocol in range(2, 6):
    message = refused(container(pickle.dumps(payload, protocol)))
    if protocol == 2:
      assert 'only tensors are admitted' in message
  assert not (tmp_path / 'harmed').exists()
  # The payloads do work where nothing holds them back.
  pickle.loads(pickle.dumps(payload))
  assert (tmp_path / 'harmed').exists()


@pytest.mark.parametrize('position', range(5))
def test_no_pickle_of_a_stream_is_trusted(refused, tmp_path, monkeypatch, position):
  monkeypatch.chdir(tmp_path)
  parts = [pickle.dumps(value, 2) for value in (MAGIC, 1001, SYSTEM)]
  parts += [state_dict(weight=tensor()), pickle.dumps(['0'], 2)]
  parts[position] = pickle.dumps(Hostile(os.mkdir, 'harmed'), 2)
  assert 'posix.mkdir' in refused(b''.join(parts) + (12).to_bytes(8, 'little') + NUMBERS.tobytes())
  assert not (tmp_path / 'harmed').exists()


@FORMATS
@pytest.mark.parametrize(
  'opcodes',
  [
    b'ctorch\nload\n' + plain(('harmed',)) + b'R',
    b'ctorch._utils\n_rebuild_tensor_v2\n)R',
    b'ctorch\nFloatStorage\n)R',
    b'ccollections\nOrderedDict\n' + plain(([['a', 1]],)) + b'R',
    b'ccollections\nOrderedDict\n)\x81',
    b'ccollections\nOrderedDict\n}b',
    b'ccollections\nOrderedDict\n' + plain('a') + plain('b') + b's',
    plain(1.5),
    plain(None),
    plain({'epoch': 3}),
    plain(['weight']),
    b'}' + b')' + b'\x85' * 200_000 + b'Ns',  # a key whose hash would exhaust the stack
    b'}' * 1_100_000,
    b'X\xff\xff\xff\xffweight',
    b'\x8e' + (2**62).to_bytes(8, 'little') + b'weight',
    b't',
    b'0' * 10,
    b'',
  ],
)
def test_other_pickles_are_refused(refused, container, opcodes):
  refused(container(b'\x80\x02' + opcodes + b'.'))
  refused(container(state_dict(weight=tensor(), other=opcodes)))


def test_a_far_place_in_the_memo_takes_no_memory(read):
  """Python's own interpreter makes its memo a list that reaches so far."""
  assert read(as_zip(b'\x80\x02}r\xff\xff\xff\xff.')) == {}


@FORMATS
@pytest.mark.parametrize(
  'broken',
  [
    dict(offset=1),
    dict(offset=-1),
    dict(offset=2**70, shape=(1,), strides=(1,)),
    dict(shape=(4, 4)),
    dict(shape=(-3, -4)),
    dict(shape=(3, 4.0)),
    dict(shape=(True, 4)),
    dict(shape=(0, 2**62, 2**62), strides=(1, 1, 1)),
    dict(shape=(2,) * 33, strides=(0,) * 33),
    dict(strides=(4,)),
    dict(strides=(-4, 1)),
    dict(offset=8, strides=(-4, 1)),
    dict(strides=(2**61, 1)),
    dict(shape=(2**20, 2**20), strides=(0, 0)),  # terabytes in an instant
    dict(shape='ab', strides='cd'),
    dict(identity=plain('storage')),
    dict(identity=storage_id(kind=b'torch\nBFloat16Storage')),
    dict(identity=storage_id(kind=b'torch._utils\n_rebuild_tensor_v2')),
    dict(identity=storage_id(kind=b'torch\nDoubleStorage')),
    dict(identity=storage_id(key='1')),
    dict(identity=storage_id(key='../data.pkl')),
    dict(identity=storage_id(key=0)),
    dict(identity=storage_id(count=11), shape=(11,), strides=(1,)),
    dict(identity=storage_id(count=2**50), shape=(2**50,), strides=(1,)),
    dict(identity=storage_id(count=-1)),
    dict(identity=storage_id(count=12.0)),
    dict(identity=storage_id(view=('1', 0, 4))),
    dict(hooks=b''),
    dict(hooks=b'}' + plain({'neg': True})),
  ],
)
def test_wrong_storages_and_tensors_are_refused(refused, container, broken):
  refused(container(state_dict(fine=tensor(), weight=tensor(**broken))))
  refused(container(state_dict(weight=tensor(**broken))))


def test_big_endian_numbers_are_refused(refused):
  good = state_dict(weight=tensor())
  assert 'big-endian' in refused(as_stream(good, system=SYSTEM | {'little_endian': False}))
  assert 'big-endian' in refused(as_zip(good, extra=[('archive/byteorder', b'big')]))


def test_other_archives_are_refused(refused):
  good = state_dict(weight=tensor())
  refused(as_zip(good, compression=zipfile.ZIP_DEFLATED))
  refused(as_zip(good, extra=[('other/data.pkl', good)]))
  refused(as_zip(good, storages=()))
  damaged = bytearray(as_zip(good))
  damaged[damaged.index(NUMBERS.tobytes()) + 5] ^= 1
  refused(bytes(damaged))


def test_a_bomb_does_not_unfold(refused):
  """Gigabytes of zeros, a thousandth of that when compressed."""
  bomb = as_zip(
    state_dict(weight=tensor(storage_id(count=2**24), shape=(2**24,), strides=(1,))),
    [('0', np.zeros(2**24, np.float32))],
    zipfile.ZIP_DEFLATED,
  )
  assert len(bomb) < 2**18
  assert 'another kind' in refused(bomb)
  # Records that overlap: the directory has one of them many times.
  plain_zip = as_zip(state_dict(weight=tensor()), [('0', np.zeros(1000, np.float32))])
  directory, end = plain_zip.index(b'PK\1\2'), plain_zip.index(b'PK\5\6')
  entries, tail = plain_zip[directory:end] * 50, bytearray(plain_zip[end:])
  tail[8:12] = (100).to_bytes(2, 'little') * 2
  tail[12:16] = len(entries).to_bytes(4, 'little')
  assert 'another kind' in refused(plain_zip[:directory] + entries + bytes(tail))


@FORMATS
def test_truncated_files_are_refused(refused, container):
  whole = container(
    state_dict(weight=tensor(), other=tensor(storage_id('1'))), [('0', NUMBERS), ('1', NUMBERS)]
  )
  for length in range(len(whole)):
    refused(whole[:length])


@FORMATS
def test_damaged_files_give_arrays_or_are_refused(read, container):
  whole = container(state_dict(weight=tensor(), other=tensor(offset=2, shape=(5,), strides=(2,))))
  rng = np.random.default_rng(0)
  refusals = 0
  for _ in range(1000):
    damaged = bytearray(whole)
    for position in rng.integers(len(whole), size=rng.integers(1, 4)):
      damaged[position] = rng.integers(256)
    try:
      found = read(bytes(damaged))
    except errors.ConfigError:
      refusals += 1
    else:
      assert all(array.nbytes <= 96 for array in found.values())
      [array.sum() for array in found.values()]
  assert refusals > 300


def test_files_that_are_not_there_or_something_else_are_refused(refused, tmp_path):
  for path in (tmp_path / 'none.pth', tmp_path):
    with pytest.raises(errors.ConfigError, match=f'{path} cannot be read'):
      torch_weights.read(path)
  refused(b'<!DOCTYPE html>\n<html></html>')
  refused(np.random.default_rng(0).bytes(1000))
