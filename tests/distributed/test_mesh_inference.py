"""Scores and samples of parameters that eight devices share equal those of one device."""

import dataclasses
import functools
import json

import numpy as np
import pytest

import farmer_jax
from farmer_jax import config, errors
from farmer_jax.distributed import mesh as mesh_lib
from tests.support import processes, runs

STACK = dict(layers=2, width=32, head_dim=8)
CONFIG = dataclasses.replace(
  runs.CONFIG,
  model=config.Model(
    patch_size=2,
    label_dropout=0.1,
    flow=config.Flow(blocks=3, **STACK),
    prior=config.Prior(
      condition_copies=2, components=4, redundant_components=8, informative_channels=2, **STACK
    ),
  ),
  sampling=config.Sampling(
    inverse='sequential',
    batch_size=8,
    chunk_size=4,
    guidance=config.Guidance(
      scale=1.0, conditional_candidates=2, unconditional_candidates=2, redundant_candidates=4
    ),
  ),
)
FAST, SLOW = ('2x2x2',), ('1x8x1', '2x4x1')
MESHES = [
  *(pytest.param(name, marks=pytest.mark.faults) for name in FAST),
  *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]


@pytest.fixture(scope='module')
def compare(tmp_path_factory):
  """Returns the results for several meshes, computed in one process."""
  run = runs.save_run(tmp_path_factory.mktemp('shared') / 'run', CONFIG)
  program = functools.partial(processes.run_program, 'mesh_inference', run, devices=8)
  return functools.cache(lambda names: json.loads(program(*names)))


@pytest.fixture(scope='module', params=MESHES, name='mesh')
def _mesh(request, compare):
  """Sizes of the axes data, fsdp and tensor, and the comparison with one device."""
  name = request.param
  return [int(size) for size in name.split('x')], compare(FAST if name in FAST else SLOW)[name]


def test_results_equal_those_of_one_device(mesh):
  _, found = mesh
  for name in ('log_prob', 'encoded'):
    assert max(found['differences'][name]) < 1e-5 * max(1, found['scale'][name]), name
  # Rounding can change which component or candidate is drawn. Such an image differs completely, so
  # nearly all images must agree, and none of these has a value that differs by more than rounding.
  for name, tolerance in dict(drawn=1e-5, sampled=1, decoded=1, parallel=1).items():
    differences = np.array(found['differences'][name])
    assert (differences <= tolerance).mean() > 0.9, name
  for name in ('decoded', 'parallel'):  # no draws
    assert max(found['differences'][name]) <= 1, name


def test_no_device_holds_all_parameters(mesh):
  """The parameters are sharded as soon as they are restored."""
  (_, fsdp, tensor), found = mesh
  assert 1 / (fsdp * tensor) <= found['share'] < 1.1 / (fsdp * tensor)


def test_decoding_gathers_parameters_once(mesh):
  """The axis `fsdp` causes no communication per token, and the axis `tensor` moves activations."""
  (_, fsdp, tensor), found = mesh
  size = 4 * found['num_parameters']
  for program in found['collectives'].values():
    gathered = program.get('all-gather', [0, 0])[1]
    assert fsdp == 1 or size / 10 < gathered < size
    assert ('all-reduce' in program) == (tensor > 1)


def devices(monkeypatch, count):
  """Replaces the devices of this process by `count` stand-ins."""
  monkeypatch.setattr(mesh_lib.jax, 'local_devices', lambda: list(range(count)))
  monkeypatch.setattr(mesh_lib.Mesh, '__init__', lambda self, sizes, _: vars(self).update(m=sizes))


@pytest.mark.parametrize(
  'count, sizes, expected',
  [
    (8, dict(), (1, 1)),
    (8, dict(data=3, fsdp=2, tensor=2), (2, 2)),
    (8, dict(fsdp=0, tensor=2), (4, 2)),
    (8, dict(tensor=0), (1, 8)),
    (2, dict(fsdp=4), (2, 1)),
    (6, dict(fsdp=4, tensor=3), (2, 3)),
    (1, dict(fsdp=16, tensor=4), (1, 1)),
  ],
)
def test_mesh_of_training_is_adapted_and_another_mesh_must_fit(monkeypatch, count, sizes, expected):
  devices(monkeypatch, count)
  asked = config.Mesh(**sizes)
  found = mesh_lib.LocalDevices(asked, adapt=True).m
  assert (found.data, found.fsdp, found.tensor) == (0, *expected)
  if all(size in (0, got) for size, got in zip((asked.fsdp, asked.tensor), expected, strict=True)):
    assert mesh_lib.LocalDevices(asked).m == found
  else:
    with pytest.raises(errors.ConfigError, match='config.mesh.fsdp'):
      mesh_lib.LocalDevices(asked)


def test_mesh_of_the_run_is_adapted_and_an_override_is_refused(tmp_path):
  built = dataclasses.replace(runs.CONFIG, mesh=config.Mesh(fsdp=16))
  (tmp_path / 'config.json').write_text(json.dumps(config.to_dict(built)))
  assert farmer_jax.load(tmp_path).mesh.mesh.size == 1
  with pytest.raises(errors.ConfigError, match=r'config\.mesh\.tensor=2'):
    farmer_jax.load(tmp_path, overrides={'mesh.tensor': 2})
