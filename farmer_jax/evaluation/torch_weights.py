"""PyTorch's files of tensors, read without PyTorch and without running anything that they name.

`torch.save` writes a pickle and, apart from it, the numbers: as records of a zip archive (since
torch 1.6), or behind the pickle. A pickle is a program. Python's own interpreter of it calls what
the file names; the one here knows the few opcodes that a dict of tensors takes, calls nothing, and
checks every offset, size and stride before it believes it.
"""

import dataclasses
import io
import math
import pathlib
import pickletools
import zipfile

import numpy as np

from farmer_jax.errors import ConfigError

# What begins a file of the older format, as pickled integers.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

# A tensor takes about 40 opcodes, and an opcode's result at most some hundred bytes.
_MOST_OPCODES = 1_000_000

_MOST_DIMENSIONS = 32

# All that a file may name, and what stands for it here. Nothing is ever imported or called.
_REBUILD = object()
_NAMES = {
  'collections OrderedDict': dict,
  'torch._utils _rebuild_tensor_v2': _REBUILD,
  'torch FloatStorage': np.dtype('<f4'),
  'torch DoubleStorage': np.dtype('<f8'),
  'torch HalfStorage': np.dtype('<f2'),
  'torch LongStorage': np.dtype('<i8'),
  'torch IntStorage': np.dtype('<i4'),
  'torch ByteStorage': np.dtype('u1'),
}


class _RefusedError(ValueError):
  """What is wrong with the file, as the middle of a sentence."""


@dataclasses.dataclass(frozen=True)
class _Storage:
  """The numbers that tensors are views of."""

  key: str
  dtype: np.dtype
  count: int

  @classmethod
  def of(cls, persistent_id):
    """The storage that a pickle refers to."""
    kind, dtype, key, _, count, *view = _short_tuple(persistent_id)
    if kind != 'storage' or not isinstance(dtype, np.dtype) or type(key) is not str:
      raise _RefusedError('it refers to something other than numbers')
    if not _is_size(count) or view not in ([], [None]):
      raise _RefusedError(f'its storage {key[:20]!r} is of a kind that is not supported')
    return cls(key, dtype, count)


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A view of a storage; offset and strides count its elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @classmethod
  def of(cls, arguments):
    """The tensor that `torch._utils._rebuild_tensor_v2` would make of these arguments."""
    storage, offset, shape, strides, _, _, *metadata = _short_tuple(arguments)
    shape, strides = _short_tuple(shape), _short_tuple(strides)
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(_is_size(n) for n in sizes) or any(metadata):
      raise _RefusedError('it has a tensor of a kind that is not supported')
    if len(shape) != len(strides):
      raise _RefusedError('it has a tensor whose shape makes no sense')
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    # More elements than numbers: a few bytes expanded to a tensor that fits no memory.
    if math.prod(shape) and (end > storage.count or math.prod(shape) > storage.count):
      raise _RefusedError('it has a tensor that is larger than its storage')
    return cls(storage, offset, shape, strides)

  def array(self, numbers):
    """The tensor, over the bytes of its storage."""
    dtype = self.storage.dtype
    if len(numbers) != self.storage.count * dtype.itemsize:
      raise _RefusedError('it is truncated or damaged')
    if not math.prod(self.shape):
      return np.zeros(self.shape, dtype)
    strides = [n * dtype.itemsize for n in self.strides]
    return np.ndarray(self.shape, dtype, numbers, self.offset * dtype.itemsize, strides)


def read(path):
  """The tensors of a state dict that `torch.save` wrote, in either of its formats.

  Args:
    path: the file.

  Returns:
    A dict of names to read-only np.ndarray. Tensors that shared memory still do, so that all
    together need no more of it than the file has bytes.

  Raises:
    ConfigError: the file cannot be read, is damaged, or has anything in it but tensors. The message
      says which; the caller knows where a better file is to be had.
  """
  try:
    content = pathlib.Path(path).read_bytes()
    return _from_zip(content) if content.startswith(b'PK\3\4') else _from_stream(content)
  except OSError as error:
    raise ConfigError(f'{path} cannot be read ({error.strerror or error})') from error
  except _RefusedError as error:
    raise ConfigError(_message(path, error)) from error
  except MemoryError:
    raise
  except Exception as error:  # Damaged bytes raise almost anything.
    raise ConfigError(_message(path, 'it is damaged, or something else')) from error


def _message(path, reason):
  return f'{path} is no PyTorch file of tensors that can be read: {reason}'


def _from_zip(content):
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    records = archive.infolist()
    # PyTorch neither compresses records nor lets them overlap; with either they could be enormous.
    plain = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not plain or sum(record.file_size for record in records) > len(content):
      raise _RefusedError('it is a zip archive of another kind')
    names = [record.filename for record in records]
    prefixes = [n.removesuffix('data.pkl') for n in names if n.endswith('/data.pkl')]
    if len(prefixes) != 1:
      raise _RefusedError('it is a zip archive of something else')
    prefix = prefixes[0]
    if f'{prefix}byteorder' in names and archive.read(f'{prefix}byteorder') != b'little':
      raise _RefusedError('its numbers are big-endian')
    tensors = _tensors(io.BytesIO(archive.read(f'{prefix}data.pkl')))
    keys = {tensor.storage.key for tensor in tensors.values()}
    numbers = {key: archive.read(f'{prefix}data/{key}') for key in keys}
  return {name: tensor.array(numbers[tensor.storage.key]) for name, tensor in tensors.items()}


def _from_stream(content):
  stream = io.BytesIO(content)
  if [_unpickled(stream), _unpickled(stream)] != [_MAGIC, _PROTOCOL]:
    raise _RefusedError('it is something else')
  if _unpickled(stream)['little_endian'] is not True:
    raise _RefusedError('its numbers are big-endian')
  tensors = _tensors(stream)
  storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
  numbers = {}
  for key in _unpickled(stream):
    count = int.from_bytes(stream.read(8), 'little')
    numbers[key] = stream.read(count * storages[key].dtype.itemsize)
  return {name: tensor.array(numbers[tensor.storage.key]) for name, tensor in tensors.items()}


def _tensors(stream):
  """The next pickle of a stream, which must be a dict of names to tensors."""
  tensors = _unpickled(stream)
  if not isinstance(tensors, dict):
    raise _RefusedError('it holds no dict of tensors')
  for name, tensor in tensors.items():
    if not isinstance(tensor, _Tensor):
      raise _RefusedError(f'its entry {name[:60]!r} is no tensor')
  return tensors


def _is_size(value):
  return type(value) is int and value >= 0


def _unpickled(stream):
  """The next pickle of a binary stream, which is left behind its end."""
  machine = _Machine()
  for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
    if count == _MOST_OPCODES:
      break
    machine.step(opcode.name, argument)
  else:
    return machine.stack.pop()
  raise _RefusedError('it is too large to be a dict of tensors')


class _Machine:
  """What runs a pickle: a stack, marks on it, and a memo of what will be needed again."""

  def __init__(self):
    self.stack, self._marks, self._memo = [], [], {}

  def step(self, opcode, argument):
    """Does what one opcode, of those that a dict of tensors takes, says."""
    stack = self.stack
    match opcode:
      case 'PROTO' | 'STOP':
        pass
      case 'BINUNICODE' | 'BININT' | 'BININT1' | 'BININT2' | 'LONG1':
        stack.append(argument)
      case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
        stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[opcode])
      case 'EMPTY_DICT' | 'EMPTY_LIST' | 'EMPTY_TUPLE':
        stack.append({'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}[opcode]())
      case 'MARK':
        self._marks.append(len(stack))
      case 'TUPLE':
        stack.append(tuple(self._popped(self._marks.pop())))
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        stack.append(tuple(self._popped(len(stack) - int(opcode[-1]))))
      case 'BINPUT' | 'LONG_BINPUT':
        self._memo[argument] = stack[-1]
      case 'BINGET' | 'LONG_BINGET':
        stack.append(self._memo[argument])
      case 'APPEND' | 'APPENDS':
        items = self._popped(len(stack) - 1 if opcode == 'APPEND' else self._marks.pop())
        _require(stack[-1], list).extend(items)
      case 'SETITEM' | 'SETITEMS':
        items = self._popped(len(stack) - 2 if opcode == 'SETITEM' else self._marks.pop())
        # Only strings are keys: the hash of a deeply nested tuple would exhaust Python's stack.
        keys = [_require(key, str) for key in items[::2]]
        _require(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
      case 'BUILD':  # Attributes of an OrderedDict: versions of the modules. None are needed.
        stack.pop()
        _require(stack[-1], dict)
      case 'GLOBAL':
        if argument not in _NAMES:
          name = argument.replace(' ', '.')[:60]
          raise _RefusedError(f'it refers to {name!r}, and only tensors are admitted')
        stack.append(_NAMES[argument])
      case 'BINPERSID':
        stack.append(_Storage.of(stack.pop()))
      case 'REDUCE':
        function, arguments = self._popped(len(stack) - 2)
        stack.append(_called(function, arguments))
      case _:
        raise _RefusedError('it is a pickle of something other than tensors')

  def _popped(self, start):
    """Takes what is on the stack from `start` on."""
    if not 0 <= start <= len(self.stack):
      raise _RefusedError('it is damaged')
    items = self.stack[start:]
    del self.stack[start:]
    return items


def _called(function, arguments):
  """What a file's call of one of `_NAMES` stands for."""
  if function is _REBUILD:
    return _Tensor.of(arguments)
  if function is dict and arguments == ():
    return {}
  raise _RefusedError('it calls something other than what makes tensors')


def _short_tuple(value):
  """`value` if it is a tuple of few entries. One with many, made once and used by each of many
  tensors, would take hours to look at."""
  if len(_require(value, tuple)) > _MOST_DIMENSIONS:
    raise _RefusedError('it has a tensor whose shape makes no sense')
  return value


def _require(value, kind):
  if type(value) is not kind:
    raise _RefusedError('it is a pickle of something other than tensors')
  return value
