"""Compares splash attention on a mesh of eight devices with XLA's attention. Prints JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
      python -m tests.support.programs.attention_on_mesh
"""

import json

import jax
import numpy as np

from farmer_jax import config
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.nn import attention, attention_kernels


def output_and_gradients(setting, q, k, v, weights):
  def loss(q, k, v):
    output = attention.attend(q, k, v, causal=True, setting=setting)
    return (output * weights).sum(), output

  gradients, output = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  return output, *gradients


def main():
  """Prints the largest difference, the shape of a shard, and the kernel for three images."""
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 8, 4, 130, 64)).astype(np.float32)
  weights = rng.normal(size=(8, 130, 4 * 64)).astype(np.float32)
  expected = output_and_gradients('xla', q, k, v, weights)
  attention_kernels._DTYPES = (np.float32,)
  attention_kernels._INTERPRET = True
  attention_kernels._device_kind = lambda: 'TPU v5 lite'
  mesh = mesh_lib.Mesh(config.Mesh(data=2, fsdp=2, tensor=2))
  with mesh.activate():
    actual = output_and_gradients('splash', q, k, v, weights)
    # Three images cannot be divided among the devices.
    fallback = attention_kernels.choose('splash', q[:3])
  difference = max(float(abs(a - b).max()) for a, b in zip(actual, expected, strict=True))
  shard = actual[0].addressable_shards[0].data.shape
  print(json.dumps({'difference': difference, 'shard': shard, 'three_images': fallback}))


if __name__ == '__main__':
  main()
