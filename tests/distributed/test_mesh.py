"""Training on eight devices equals training on one device, for every mesh."""

import functools
import json

import pytest

from farmer_jax import config, errors
from farmer_jax.distributed import mesh as mesh_lib
from tests.support import processes

FAST, SLOW = ('2x2x2',), ('8x1x1', '1x8x1', '2x4x1')
MESHES = [
  *(pytest.param(name, marks=pytest.mark.faults) for name in FAST),
  *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]


@functools.cache
def compare(names, kind='autoregressive'):
  """Returns the results for several meshes, computed in one process."""
  return json.loads(processes.run_program('mesh_comparison', kind, *names, devices=8))


def assert_small(differences):
  for quantity, difference in differences.items():
    assert difference < 1e-5, quantity


@pytest.fixture(scope='module', params=MESHES, name='mesh')
def _mesh(request):
  """Sizes of the axes data, fsdp and tensor, and the comparison with one device."""
  name = request.param
  return [int(size) for size in name.split('x')], compare(FAST if name in FAST else SLOW)[name]


def test_metrics_and_gradients_equal_those_of_one_device(mesh):
  _, found = mesh
  assert_small(found['differences'])


@pytest.mark.faults
def test_coupling_flow_on_a_mesh_equals_that_on_one_device():
  assert_small(compare(FAST, 'coupling')[FAST[0]]['differences'])


@pytest.mark.faults
def test_distillation_on_a_mesh_equals_that_on_one_device():
  found = compare(FAST, 'student')[FAST[0]]
  assert_small(found['differences'])
  assert found['mlp'] == found['moments'] == [3, 1, 24 // 2, 48 // 2]


def test_parameters_optimizer_state_and_batches_are_sharded(mesh):
  (_, fsdp, tensor), found = mesh
  # [blocks, layers, width, 2 width]
  assert found['mlp'] == found['moments'] == [3, 2, 16 // fsdp, 32 // tensor]
  assert found['share_of_state'] < 1.2 / (fsdp * tensor) + 0.05
  assert set(found['batch']) == {16 * tensor // 8} and found['process_shard'] == [0, 1]
  assert (found['gathers'] > 0) == (fsdp * tensor > 1)
  # The kernel of the redundant mixture and its gradient stay sharded. Activations move instead.
  assert found['gathers_redundant_kernel'] == (fsdp * tensor == 1)


def test_size_of_zero_takes_the_remaining_devices():
  for axes, expected in (
    ({}, (8, 1, 1)),
    (dict(fsdp=0), (1, 8, 1)),
    (dict(tensor=0), (1, 1, 8)),
    (dict(data=0, fsdp=4), (2, 4, 1)),
    (dict(data=2, fsdp=0), (2, 4, 1)),
  ):
    assert mesh_lib._axis_sizes(config.Mesh(**axes), 8) == expected


@pytest.mark.parametrize('axis, value', [('data', 3), ('embed', 'depth'), ('hidden', 'fsdp,fsdp')])
def test_wrong_settings_name_the_key(axis, value):
  with pytest.raises(errors.ConfigError, match=f'config.mesh.{axis}='):
    mesh_lib.Mesh(config.Mesh(**{axis: value}))
