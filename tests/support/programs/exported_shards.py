"""Compares an export on meshes of eight devices with its run on one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
      python -m tests.support.programs.exported_shards WORKDIR EXPORT 2x2x2 1x8x1

The meshes are sizes of the axes data, fsdp and tensor. Prints JSON.
"""

import json
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
from etils import epath
from safetensors import numpy as safetensors

import farmer_jax
from farmer_jax import exports
from tests.support.exports import record
from tests.support.programs.mesh_inference import largest_share

LABELS = list(range(8))


def evaluate(run):
  images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
  return run.log_prob(images, LABELS).nats, run.decode(run.encode(images, LABELS), LABELS)


def weights(folder):
  arrays = safetensors.load_file(f'{folder}/model.safetensors')
  return {name: array.tolist() for name, array in arrays.items()}


def main():
  workdir, folder, *names = sys.argv[1:]
  with mock.patch.object(jax, 'local_devices', lambda: jax.devices()[:1]):
    original = farmer_jax.load(workdir)
    expected = evaluate(original)
  results = {}
  for name in names:
    _, fsdp, tensor = map(int, name.split('x'))
    run = farmer_jax.load(folder, overrides={'mesh.fsdp': fsdp, 'mesh.tensor': tensor})
    equal = jax.tree.map(
      lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), run.params, original.params
    )
    nats, pixels = evaluate(run)
    with tempfile.TemporaryDirectory() as temporary, run.activate():
      target = epath.Path(temporary) / 'export'
      exports.write(target, run.params, record(run.config), {}, 1e9)
      again = weights(target) == weights(folder)
    results[name] = {
      'equal': all(jax.tree.leaves(equal)),
      'share': largest_share(run.params),
      'log_prob': float(abs(nats / expected[0] - 1).max()),
      'pixels': int(abs(pixels.astype(int) - expected[1]).max()),
      'exported_again': again,
    }
  print(json.dumps(results))


if __name__ == '__main__':
  main()
