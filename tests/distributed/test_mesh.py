"""Training on eight devices is training on one, whatever the mesh."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import functools, json, re
import jax, numpy as np
import flax.linen as nn
from farmer_jax import config, losses
from farmer_jax.nn import farmer
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.training import loop, optimizer, step

SETTINGS = config.Config(
  data=config.Data(image_size=8, num_classes=3, flip=True),
  model=config.Model(
    patch_size=2,
    remat='dots',
    flow=config.Flow(blocks=3, layers=2, width=16, head_dim=8),
    prior=config.Prior(
      layers=2, width=16, head_dim=8, condition_copies=2, components=8, informative_channels=2,
      redundant_components=16,
    ),
  ),
  train=config.Train(batch_size=16, accumulate=2, steps=10, ema_decay=0.9),
)
MODEL = farmer.build(SETTINGS)
rng = np.random.default_rng(0)
BATCH = {
  'image': rng.integers(0, 256, (16, 8, 8, 1), np.uint8),
  'label': rng.integers(0, 3, 16).astype(np.int32),
}


def init(key):
  params = farmer.init_named_params(key, model=MODEL)
  fill = functools.partial(jax.random.normal, jax.random.key(1))
  return jax.tree.map(lambda a: a + 0.2 * fill(a.shape), params)


def run(devices, settings):
  mesh = mesh_lib.Mesh(settings, devices)
  with mesh():
    optim = optimizer.create(SETTINGS.train)
    state = loop._initial_state(SETTINGS, mesh, init, optim, {})
    noise = optimizer.noise_std_schedule(SETTINGS.noise, 10)
    loss = functools.partial(
      losses.nll_loss, model=MODEL, config=SETTINGS, noise_std=noise
    )
    batch = mesh.batch(BATCH)
    gradients = jax.jit(jax.grad(lambda p: loss(p, batch, 0, 0)[0]))(state.params)
    step_fn = step.make_train_step(loss, optim, SETTINGS.train)
    stays = jax.tree.map(lambda a: a.sharding, state), mesh.whole
    compiled = jax.jit(step_fn, out_shardings=stays).lower(state, batch).compile()
    new, metrics = compiled(state, batch)
  return mesh, state, new, jax.device_get((metrics, gradients)), compiled.as_text()


def largest_difference(a, b):
  scale = max(float(abs(x).max()) for x in jax.tree.leaves(a))
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs) / scale


one = run(jax.devices()[:1], config.Mesh())
results = {}
for data, fsdp, tensor in ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)):
  found = run(jax.devices(), config.Mesh(data=data, fsdp=fsdp, tensor=tensor))
  mesh, state, new, (metrics, gradients), text = found
  mlp = state.params['flow']['stack']['transformer']['stack']['mlp_in']['kernel']
  moments = new.opt_state[1][0].mu['flow']['stack']['transformer']['stack']['mlp_in']['kernel']
  whole = sum(a.size for a in jax.tree.leaves(state))
  largest = max(
    sum(s.data.size for a in jax.tree.leaves(state) for s in a.addressable_shards if s.device == d)
    for d in jax.devices()
  )
  results[f'{data}x{fsdp}x{tensor}'] = {
    'loss': abs(float(metrics['loss']) / float(one[3][0]['loss']) - 1),
    'metrics': largest_difference(one[3][0], metrics),
    'gradients': largest_difference(one[3][1], gradients),
    'initial': largest_difference(one[1].params, state.params),
    'mlp': list(mlp.sharding.shard_shape(mlp.shape)),
    'moments': list(moments.sharding.shard_shape(moments.shape)),
    'share_of_state': largest / whole,
    'gathers': text.count('all-gather('),
    # The redundant head's kernel is [16, 80].
    'head_travels': bool(re.search(r'\\[(16,80|80,16)\\].* all-(gather|reduce)\\(', text)),
    'batch': [s.data.shape[0] for s in mesh.batch(BATCH)['image'].addressable_shards],
    'share': list(mesh.share()),
  }
print(json.dumps(results))
"""


@pytest.fixture(scope='module')
def results():
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, env=environment)
  assert done.returncode == 0, done.stderr.decode()
  return json.loads(done.stdout.splitlines()[-1])


MESHES = {
  '8x1x1': (1, 1),
  '1x8x1': (8, 1),
  '2x4x1': (4, 1),
  '2x2x2': (2, 2),
}


def test_one_axis_takes_the_devices_that_are_left():
  program = """
import jax
from farmer_jax import config
from farmer_jax.distributed import mesh
for settings in ({}, dict(fsdp=0), dict(tensor=0), dict(data=0, fsdp=4), dict(data=2, fsdp=0)):
  print(list(mesh.Mesh(config.Mesh(**settings)).mesh.shape.values()))
"""
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, env=environment)
  expected = [[8, 1, 1], [1, 8, 1], [1, 1, 8], [2, 4, 1], [2, 4, 1]]
  assert [json.loads(line) for line in done.stdout.splitlines()] == expected, done.stderr.decode()


@pytest.mark.parametrize('name', MESHES)
def test_loss_and_gradients_are_those_of_one_device(results, name):
  found = results[name]
  for what in ('loss', 'metrics', 'gradients', 'initial'):
    assert found[what] < 1e-5, what


@pytest.mark.parametrize('name, parts', MESHES.items(), ids=MESHES)
def test_parameters_and_optimizer_are_split_and_batches_too(results, name, parts):
  fsdp, tensor = parts
  found = results[name]
  # [blocks, layers, width, 4 width]
  assert found['mlp'] == found['moments'] == [3, 2, 16 // fsdp, 64 // tensor]
  assert found['share_of_state'] < 1.2 / (fsdp * tensor) + 0.05
  assert set(found['batch']) == {16 * tensor // 8} and found['share'] == [0, 1]
  assert (found['gathers'] > 0) == (fsdp * tensor > 1)
  # Where the parameters are split, neither the weights of the redundant head nor their gradient are
  # ever whole: images travel to them.
  assert found['head_travels'] == (fsdp * tensor == 1)
