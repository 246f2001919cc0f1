"""Collectives of a compiled program: groups of devices, and bytes that each device sends."""

import math
import re
from typing import NamedTuple

import numpy as np

from farmer_jax.xla import hlo

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

_CHANNEL = re.compile(r'channel_id=(\d+)')
_LISTED = re.compile(r'replica_groups=\{\{([\d,]+)\}')
_STRIDED = re.compile(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}')
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_USED_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r'source_target_pairs=\{(.*?)\}\}')


class Collective(NamedTuple):
  """One collective."""

  kind: str
  bytes: int  # of the results on one device
  local: float  # bytes that a device sends
  network: float  # bytes that a device sends to other hosts


def channel(instruction: hlo.Instruction) -> str | None:
  """Returns the number that all parts of one collective share, if it has one."""
  found = _CHANNEL.search(instruction.text)
  return found[1] if found else None


def parse(instruction: hlo.Instruction, num_devices: int, per_host: int) -> Collective | None:
  """Returns the collective that an instruction starts, or None.

  `local` and `network` are the least bytes that any algorithm sends. g devices in H hosts, L of
  them in each host, gather or scatter arrays of S bytes. Each device sends (g-1)/g·S bytes, and
  all devices of a host together send (H-1)/H·S bytes to other hosts, through one adapter per
  device. An all-reduce is a scatter and a gather. In an all-to-all, each device sends S/g bytes to
  each other device.
  """
  kind = instruction.opcode.removesuffix('-start')
  if kind not in KINDS:
    return None
  found = instruction.results
  # The start of an asynchronous collective returns its operands before its results.
  if kind == 'collective-permute' and kind != instruction.opcode:
    found = found[1:2]  # Two flags follow on TPUs.
  elif kind != instruction.opcode and kind != 'all-reduce':
    found = found[len(found) // 2 :]
  size = sum(array.bytes for array in found)
  if kind == 'collective-permute':
    pairs = _PAIRS.search(instruction.text)
    ends = [int(n) // per_host for n in re.findall(r'\d+', pairs[1])] if pairs else []
    crosses = ends[::2] != ends[1::2]
    return Collective(kind, size, size, size * crosses)
  group = _group(instruction.text, num_devices)
  hosts = len({device // per_host for device in group})
  g, members = len(group), len(group) / hosts
  total = size * (g if kind == 'reduce-scatter' else 2 if kind == 'all-reduce' else 1)
  if kind == 'all-to-all':
    network = total * (g - members) / g
  else:
    network = total * (hosts - 1) / hosts / members
  return Collective(kind, size, total * (g - 1) / g, network)


def _group(text: str, num_devices: int) -> list[int]:
  """Returns the first group of devices, by their positions in the mesh of the program."""
  if listed := _LISTED.search(text):
    return [int(n) for n in listed[1].split(',')]
  if strided := _STRIDED.search(text):
    dims = [int(n) for n in strided[3].split(',')]
    order = [int(n) for n in strided[4].split(',')] if strided[4] else range(len(dims))
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return ids.reshape(int(strided[1]), int(strided[2]))[0].tolist()
  if mesh := _MESH.search(text):
    return _mesh_group(_MESH_AXIS.findall(mesh[1]), _USED_AXIS.findall(mesh[2]))
  return list(range(num_devices))  # An empty list of groups means all devices.


def _mesh_group(sizes: list[tuple[str, str]], used: list[tuple[str, str, str]]) -> list[int]:
  """Returns the first group of a mesh such as mesh['a'=2,'b'=4] {'a','b':(2)2}.

  `'b':(2)2` is the part of the axis b that has 2 positions and follows a part of size 2.
  """
  ids = np.arange(math.prod(int(n) for _, n in sizes))
  strides: dict[str, int] = {}
  for position, (name, _) in enumerate(sizes):
    strides[name] = math.prod(int(n) for _, n in sizes[position + 1 :])
  group = ids[:1]
  for name, before, part in used:
    size = int(dict(sizes)[name])
    count = int(part) if part else size
    stride = strides[name] * (size // (int(before) * count) if part else 1)
    group = (group[:, None] + stride * np.arange(count)).ravel()
  return group.tolist()
