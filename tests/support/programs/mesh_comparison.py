"""Compares a training step on meshes of eight devices with a step on one device. Prints JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
      python -m tests.support.programs.mesh_comparison autoregressive 2x2x2 1x8x1

The arguments are the kind of the flow, or `student` for a step of distillation, and the sizes of
the axes data, fsdp and tensor.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from farmer_jax import config, losses
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.evaluation import classifier
from farmer_jax.nn import farmer, student
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import step as step_lib
from tests.support import models

IS_STUDENT = sys.argv[1] == 'student'
CONFIG = config.Config(
  data=config.Data(image_size=8, num_classes=3, flip=True),
  model=models.model_config(
    dict(
      kind='autoregressive' if IS_STUDENT else sys.argv[1], blocks=3, layers=2, width=16, head_dim=8
    ),
    dict(layers=2, width=16, head_dim=8, components=8, redundant_components=16),
    dtype='float32',
    remat='dots',
  ),
  train=config.Train(batch_size=16, accumulation_steps=2, steps=10, ema_decay=0.9),
  distill=config.Distill(
    **dict(objective='hidden', all_tokens=True, layers=1, width=24, normalize_targets=True),
    perceptual_weight=1.0,
  ),
)
MODEL = student.build(CONFIG) if IS_STUDENT else farmer.build(CONFIG)
NETWORK = classifier.Classifier(3)
MLP_KERNEL = '(flow|student).*mlp_in.*kernel'
# The kernel of the redundant mixture, [16, 80], in a collective.
REDUNDANT_KERNEL = re.compile(r'\[(16,80|80,16)\].* all-(gather|reduce)\(')


def init_params(key, *frozen):
  """Returns random boxed parameters without zeros."""
  init = losses.init_student if frozen else lambda key, model: farmer.init_boxed_params(key, model)
  params = init(key, *frozen, model=MODEL)
  return jax.tree.map(lambda a: a + 0.3 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params)


def frozen_params(mesh):
  """Returns the sharded parameters of a teacher, and those of a classifier on each device."""
  blank = jnp.zeros((1, 8, 8, 1))
  teacher = models.filled_parameters(farmer.build(CONFIG), blank, jnp.zeros(1, int))
  boxed = jax.eval_shape(lambda key: farmer.init_boxed_params(key, MODEL), jax.random.key(0))
  network = models.filled_parameters(NETWORK, blank.astype(jnp.uint8))
  replicated = jax.device_put({'params': network}, mesh.replicated)
  return jax.device_put(teacher, mesh.shardings(boxed)), replicated


def take_step(mesh):
  """Runs a step. Returns values to compare, the new state, the batch, and the compiled HLO."""
  rng = np.random.default_rng(0)
  arrays = {
    'image': rng.integers(0, 256, (16, 8, 8, 1), np.uint8),
    'label': rng.integers(0, 3, 16).astype(np.int32),
  }
  optimizer = optimizer_lib.create(CONFIG)
  init = step_lib.initializer(init_params, optimizer, CONFIG.train.ema_decay)
  key, frozen = jax.random.key(0), frozen_params(mesh) if IS_STUDENT else ()
  loss = functools.partial(losses.nll_loss, model=MODEL, config=CONFIG)
  if IS_STUDENT:
    features = functools.partial(NETWORK.apply, method='hidden_layers')
    loss = functools.partial(
      losses.distillation_loss, model=MODEL, config=CONFIG, features=features
    )
  with mesh.activate():
    shardings = mesh.shardings(jax.eval_shape(init, key, *frozen))
    state = jax.jit(lambda *a: mesh_lib.unboxed(init(*a)), out_shardings=shardings)(key, *frozen)
    batch = mesh.global_batch(arrays)
  step = step_lib.make_train_step(loss, optimizer, CONFIG.train)
  compiled = step_lib.lower(step, mesh, state, batch, frozen).compile()
  values = {'initial parameters': jax.device_get(state.params)}
  state, metrics = compiled(state, batch, *frozen)
  values |= jax.device_get({'metrics': metrics, 'loss': metrics['loss']})
  # After the first step, the first moments of Adam are proportional to the gradients.
  values['gradients'] = jax.device_get(select(state.opt_state, r'\.mu'))
  return values, state, batch, compiled.as_text()


def select(tree, pattern):
  """Returns the arrays whose path matches the pattern."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [a for path, a in leaves if re.search(pattern, jax.tree_util.keystr(path))]


def shard_shape(tree, pattern):
  """Returns the shape of a shard of the only array whose path matches the pattern."""
  (array,) = select(tree, pattern)
  return list(array.sharding.shard_shape(array.shape))


def difference(a, b):
  """Returns the largest difference between two trees, relative to the largest value."""
  a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
  return float(abs(a - b).max() / abs(a).max())


def largest_share(state):
  """Returns the largest fraction of the state that one device holds."""
  shards = [s for a in jax.tree.leaves(state) for s in a.addressable_shards]
  sizes = [sum(s.data.size for s in shards if s.device == device) for device in jax.devices()]
  return max(sizes) / sum(a.size for a in jax.tree.leaves(state))


def main():
  expected, *_ = take_step(mesh_lib.Mesh(config.Mesh(), jax.devices()[:1]))
  results = {}
  for name in sys.argv[2:]:
    data, fsdp, tensor = map(int, name.split('x'))
    mesh = mesh_lib.Mesh(config.Mesh(data=data, fsdp=fsdp, tensor=tensor))
    values, state, batch, text = take_step(mesh)
    results[name] = {
      'differences': {key: difference(expected[key], values[key]) for key in expected},
      'mlp': shard_shape(state.params, MLP_KERNEL),
      'moments': shard_shape(state.opt_state, r'\.mu.*' + MLP_KERNEL),
      'share_of_state': largest_share(state),
      'gathers': text.count('all-gather('),
      'gathers_redundant_kernel': bool(REDUNDANT_KERNEL.search(text)),
      'batch': [s.data.shape[0] for s in batch['image'].addressable_shards],
      'process_shard': list(mesh.process_shard()),
    }
  print(json.dumps(results))


if __name__ == '__main__':
  main()
