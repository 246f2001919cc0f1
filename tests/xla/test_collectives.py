"""Groups of devices in the text of a collective, and the bytes that each device sends."""

import pytest

from farmer_jax.xla import collectives, hlo

GATHER = '%g = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), channel_id=1, GROUPS, dimensions={0}'


def parse(line, groups, per_host):
  lines = ['ENTRY %main (p: f32[2]) -> f32[8] {', f'  {line.replace("GROUPS", groups)}', '}']
  (instruction,) = hlo.Program('\n'.join(lines)).entry.values()
  return collectives.parse(instruction, 8, per_host)


@pytest.mark.parametrize(
  ('groups', 'hosts'),
  [
    ('replica_groups={{0,1,2,3},{4,5,6,7}}', 2),
    ('replica_groups={{0,4,1,5},{2,6,3,7}}', 2),
    ('replica_groups=[2,4]<=[8]', 2),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', 4),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 2),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", 2),
  ],
)
def test_group_of_four_devices(groups, hosts):
  found = parse(GATHER, groups, per_host=2)
  assert found[:2] == ('all-gather', 32)
  assert found.local == 32 * 3 / 4
  # Each host receives the parts of the other hosts through the adapters of its devices.
  assert found.network == 32 * (hosts - 1) / hosts / (4 / hosts)
  assert parse(GATHER, groups, per_host=8).network == 0


@pytest.mark.parametrize(
  ('line', 'size', 'local', 'network'),
  [
    ('%r = f32[8]{0} all-reduce(%p), GROUPS, to_apply=%add', 32, 2 * 32 * 3 / 4, 32),
    ('%r = f32[2]{0} reduce-scatter(%p), GROUPS, to_apply=%add', 8, 32 * 3 / 4, 32 / 2),
    ('%r = f32[8]{0} all-to-all(%p), GROUPS', 32, 32 * 3 / 4, 32 * 3 / 4),
  ],
)
def test_bytes_of_a_group_with_one_device_in_each_host(line, size, local, network):
  found = parse(line, 'replica_groups={{0,2,4,6},{1,3,5,7}}', per_host=2)
  if found.kind != 'all-to-all':
    network *= 3 / 4 * 2
  assert (found.bytes, found.local, found.network) == (size, local, network)


def test_permutation_uses_the_network_if_a_pair_crosses_hosts():
  line = '%r = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{PAIR}}'
  assert parse(line.replace('PAIR', '2,3'), '', per_host=2)[1:] == (32, 32, 0)
  assert parse(line.replace('PAIR', '1,2'), '', per_host=2)[1:] == (32, 32, 32)


def test_asynchronous_permutation_sends_its_result_and_no_flags():
  result = '(f32[8]{0}, f32[8]{0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)})'
  line = f'%r = {result} collective-permute-start(%p), source_target_pairs={{{{0,1}},{{1,0}}}}'
  assert parse(line, '', per_host=8)[1:] == (32, 32, 0)


def test_no_groups_means_all_devices_and_other_instructions_are_none():
  assert parse('%r = f32[8]{0} all-reduce(%p), replica_groups={}', '', 8).local == 2 * 32 * 7 / 8
  assert parse('%r = f32[8]{0} add(%p, %p)', '', 8) is None
