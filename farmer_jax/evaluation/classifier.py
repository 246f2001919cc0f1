"""A small classifier of the training images, in place of Inception.

Inception is trained on color photographs. For small or gray images, the features of this classifier
are compared instead. The classifier also shows how often a sample is recognized as its class.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

from farmer_jax import config, losses, terminal
from farmer_jax.data import base
from farmer_jax.evaluation import feature_statistics, image_sets
from farmer_jax.ops import random
from farmer_jax.workdir import layout

NUM_FEATURES = 128
_BATCH_SIZE, _STEPS, _SEED = 128, 5000, 0
_LEARNING_RATE = 2e-3

Images = UInt8[Array, 'B H W C']
Values = Float[Array, 'B H W C']
Params = dict[str, Any]


class Classifier(nn.Module):
  """Three strided convolutions and a hidden layer. The hidden units are the features."""

  num_classes: int

  def __call__(self, images: Images) -> feature_statistics.Outputs:
    *_, features, logits = self._layers(images.astype(jnp.float32) / 127.5 - 1)
    return feature_statistics.Outputs(features, logits)

  def hidden_layers(self, values: Values) -> list[Float[Array, 'B ...']]:
    """Returns the outputs of the convolutions and the features, for values in [-1, 1]."""
    return self._layers(values)[:-1]

  @nn.compact
  def _layers(self, values: Values) -> list[Float[Array, 'B ...']]:
    precision = jax.lax.Precision.HIGHEST
    outputs = [values]
    for channels in (32, 64, 128):
      convolution = nn.Conv(channels, (3, 3), (2, 2), precision=precision)
      outputs.append(nn.relu(convolution(outputs[-1])))
    flat = outputs[-1].reshape(len(values), -1)
    outputs.append(nn.relu(nn.Dense(NUM_FEATURES, precision=precision)(flat)))
    return [*outputs[1:], nn.Dense(self.num_classes, precision=precision)(outputs[-1])]


def load_or_train(data: config.Data, train_source: base.Source, folder: epath.Path) -> Params:
  """Returns the parameters of the classifier of the training images.

  The first call trains the classifier and writes the parameters to `folder`. Later calls read them.
  """
  images = base.fingerprint(train_source), len(train_source)
  key = *images, data.image_size, data.channels, data.num_classes
  file = folder / f'classifier-{layout.short_hash(key)}.npz'
  blank = jnp.zeros((1, data.image_size, data.image_size, data.channels), jnp.uint8)
  network = Classifier(data.num_classes)
  initial = network.init(random.named_key(_SEED, 'classifier'), blank)['params']
  leaves, tree = jax.tree.flatten(initial)
  if file.exists():
    try:
      with file.open('rb') as opened, np.load(opened, allow_pickle=False) as arrays:
        return jax.tree.unflatten(tree, [arrays[f'arr_{i}'] for i in range(len(leaves))])
    except (*image_sets.NPZ_ERRORS, KeyError) as error:
      logging.warning(f'{file} is corrupt ({error}). The classifier is trained again.')
  params = _train(network, train_source, initial, data)
  layout.write_npz(file, {f'arr_{i}': leaf for i, leaf in enumerate(jax.tree.leaves(params))})
  return params


def _train(network: Classifier, source: base.Source, params: Params, data: config.Data) -> Params:
  """Trains with Adam and a cosine schedule on augmented images."""
  optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, _STEPS))

  @jax.jit
  def train_step(
    params: Params, state: optax.OptState, images: Images, labels: Int[Array, 'B'], step: int
  ) -> tuple[Params, optax.OptState, Float[Array, '']]:
    def loss_fn(params: Params) -> Float[Array, '']:
      outputs: Any = network.apply({'params': params}, _augment(images, step, data))
      return optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, loss

  state, rng = optimizer.init(params), np.random.default_rng(_SEED)
  with terminal.progress_bar('training the classifier', 'step', _STEPS) as bar:
    for step in range(_STEPS):
      batch = source.gather(rng.integers(len(source), size=_BATCH_SIZE))
      params, state, loss = train_step(params, state, batch['image'], batch['label'], step)
      if step % 50 == 49:
        bar.set_postfix(loss=f'{float(loss):.3f}', refresh=False)
      bar.update()
  return params


def _augment(images: Images, step: int, data: config.Data) -> Images:
  """Shifts each image by up to two pixels, and flips images like training."""
  key_shift, key_flip = (random.named_key(_SEED, name, step) for name in ('shift', 'mirror'))
  shifts = jax.random.randint(key_shift, (len(images), 2), -2, 3)
  images = jax.vmap(lambda image, shift: jnp.roll(image, shift, (0, 1)))(images, shifts)
  return losses.random_flip(key_flip, images, data)
