"""The classifier: its parameters, and its hidden layers for images that are not quantized."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from farmer_jax.evaluation import classifier
from tests.support import models

IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)), jnp.uint8)


class Reference(nn.Module):
  """The classifier of version 0.1, whose parameters are stored in workdirs."""

  @nn.compact
  def __call__(self, images):
    x, outputs = images / 127.5 - 1, []
    for channels in (32, 64, 128):
      x = nn.relu(nn.Conv(channels, (3, 3), (2, 2), precision='highest')(x))
      outputs.append(x)
    outputs.append(nn.relu(nn.Dense(128, precision='highest')(x.reshape(len(x), -1))))
    return outputs, nn.Dense(5, precision='highest')(outputs[-1])


def test_stored_classifiers_stay_valid():
  """Initial values, names of parameters, and outputs are those of version 0.1."""
  module, key = classifier.Classifier(5), jax.random.key(0)
  found, expected = (m.init(key, IMAGES)['params'] for m in (module, Reference()))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  params = {'params': models.filled_parameters(module, IMAGES)}
  hidden, logits = Reference().apply(params, IMAGES)
  outputs = module.apply(params, IMAGES)
  np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(outputs.pool, hidden[-1], rtol=1e-5, atol=1e-5)
  values = IMAGES.astype(jnp.float32) / 127.5 - 1
  layers = module.apply(params, values, method='hidden_layers')
  assert len(layers) == len(hidden) == 4
  for layer, reference in zip(layers, hidden, strict=True):
    np.testing.assert_allclose(layer, reference, rtol=1e-5, atol=1e-5)
