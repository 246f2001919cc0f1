"""Reads what Weights & Biases recorded offline: WORKDIR/wandb/offline-run-*/run-ID.wandb."""

import json
import pathlib
import struct

# The format of LevelDB's log, after a header: blocks with records, which are split at their ends.
_HEADER, _BLOCK = 7, 32768
_FULL, _LAST = 1, 4


def read(workdir):
  """Returns the records of each job of a run, in the order of the jobs."""
  files = pathlib.Path(workdir).glob('wandb/offline-run-*/*.wandb')
  return [_records(file.read_bytes()) for file in sorted(files, key=lambda f: f.stat().st_mtime)]


def history(records):
  """Returns the logged dicts of a job, without the keys that wandb adds."""
  rows = []
  for record in records:
    if record.WhichOneof('record_type') == 'history':
      items = {
        '.'.join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
      }
      rows.append({key: value for key, value in items.items() if not key.startswith('_')})
  return rows


def _records(data):
  from wandb.proto import wandb_internal_pb2

  found, parts, position = [], b'', _HEADER
  while position + 7 <= len(data):
    left = _BLOCK - position % _BLOCK
    if left < 7:
      position += left
      continue
    length, kind = struct.unpack_from('<HB', data, position + 4)  # after a checksum
    parts += data[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (_FULL, _LAST):
      found.append(wandb_internal_pb2.Record.FromString(parts))
      parts = b''
  return found
