"""A small classifier, trained on the spot on the real images: its features and its labels judge
samples of data that Inception does not suit."""

import hashlib
import zipfile
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from farmer_jax import terminal
from farmer_jax.evaluation import feature_statistics
from farmer_jax.ops import random
from farmer_jax.workdir import layout

CHANNELS = 128  # features of an image
_BATCH, _STEPS, _SEED = 128, 5000, 0


class Network(nn.Module):
  """Three strided convolutions and a hidden layer."""

  num_classes: int

  @nn.compact
  def __call__(self, images):  # uint8 [B, H, W, C]
    """The `feature_statistics.Outputs`."""
    x = images.astype(jnp.float32) / 127.5 - 1
    for channels in (32, 64, 128):
      x = nn.relu(nn.Conv(channels, (3, 3), (2, 2))(x))
    features = nn.relu(nn.Dense(CHANNELS)(x.reshape(len(x), -1)))
    return feature_statistics.Outputs(features, nn.Dense(self.num_classes)(features))


def load_or_train(data, train_source, folder, contents):
  """The classifier for a data set; trained once, then kept in `folder` (an `epath.Path`).

  Args:
    data: `config.Data`.
    train_source: its training images, a `data.base.Source`.
    folder: where the weights are kept.
    contents: of the images, as `data.base.contents` has it.

  Returns:
    network(params, uint8 [B, H, W, C]) -> `feature_statistics.Outputs`; its params, and what tells these
    weights from others, in characters.
  """
  what = repr((contents, len(train_source), data.image_size, data.channels, data.num_classes))
  file = folder / f'classifier-{zlib.crc32(what.encode()):08x}.npz'
  template = _init(data)
  paths, tree = jax.tree.flatten(template)
  params = _read(file, paths, tree) if file.exists() else None
  if params is None:
    params = _train(data, train_source, template)
    folder.mkdir(parents=True, exist_ok=True)
    with layout.replacing(file) as temporary, temporary.open('wb') as opened:
      np.savez(opened, *jax.tree.leaves(params))
  network = Network(data.num_classes)
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  return (
    lambda params, images: network.apply({'params': params}, images),
    params,
    digest.hexdigest(),
  )


def _read(file, leaves, tree):
  """The weights in a file, or None, said so, if it is damaged."""
  try:
    with file.open('rb') as opened, np.load(opened) as arrays:
      found = [arrays[f'arr_{i}'] for i in range(len(leaves))]
  except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    terminal.say(f'{file} is damaged ({error}); the classifier is trained again.')
    return None
  return jax.tree.unflatten(tree, found)


def _init(data):
  images = jnp.zeros((1, data.image_size, data.image_size, data.channels), jnp.uint8)
  return Network(data.num_classes).init(random.named_key(_SEED, 'classifier'), images)['params']


def _train(data, source, params):
  """Adam with a cosine; images are shifted a little and, where the model's are, mirrored."""
  network, optimizer = (
    Network(data.num_classes),
    optax.adam(optax.cosine_decay_schedule(2e-3, _STEPS)),
  )

  @jax.jit
  def step(params, state, images, labels, index):
    def loss(params):
      outputs: Any = network.apply({'params': params}, _augmented(images, index, data.flip))
      return optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, value

  state, order = optimizer.init(params), np.random.default_rng(_SEED)
  with terminal.progress('training the classifier', 'step', _STEPS) as bar:
    for index in range(_STEPS):
      batch = source.gather(order.integers(len(source), size=_BATCH))
      params, state, value = step(params, state, batch['image'], batch['label'], index)
      if index % 50 == 49:
        bar.set_postfix(loss=f'{float(value):.3f}', refresh=False)
      bar.update()
  return params


def _augmented(images, index, flip):
  key_shift, key_flip = (random.named_key(_SEED, name, index) for name in ('shift', 'mirror'))
  shifts = jax.random.randint(key_shift, (len(images), 2), -2, 3)
  images = jax.vmap(lambda image, shift: jnp.roll(image, shift, (0, 1)))(images, shifts)
  if not flip:
    return images
  mirrored = jax.random.bernoulli(key_flip, 0.5, (len(images), 1, 1, 1))
  return jnp.where(mirrored, images[:, :, ::-1], images)
