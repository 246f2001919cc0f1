"""Compares scores and samples of a run on meshes of eight devices with those of one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
      python -m tests.support.programs.mesh_inference WORKDIR 2x4x1 1x8x1

The arguments are the workdir, and sizes of the axes data, fsdp and tensor. Prints JSON.
"""

import json
import sys
from unittest import mock

import jax
import numpy as np

import farmer_jax
from farmer_jax.data import sources
from farmer_jax.xla import cycles, hlo

BATCH = 16


def evaluate(run):
  """Returns values of a run to compare: log-densities, latents of images, samples, and images."""
  examples = sources.load(run.config.data, 'valid').gather(np.arange(BATCH))
  images, labels = examples['image'], examples['label']
  encoded = run.encode(images, labels)
  sampler, numbers = run._sampler(), np.asarray(labels, np.int32)
  with run.mesh.activate():
    arguments = run.mesh.shard((numbers, np.arange(BATCH, dtype=np.int32)))
    drawn = sampler.latents(run.params, *arguments)
  return {
    'log_prob': run.log_prob(images, labels).nats,
    'encoded': encoded,
    'drawn': jax.device_get(drawn),
    'decoded': run.decode(encoded, labels).astype(float),
    'sampled': run.sample(labels).astype(float),
    'parallel': run._quantized(run._sampler(inverse='chunked').images, encoded, numbers).astype(
      float
    ),
  }


def largest_share(tree):
  """Returns the largest fraction of a tree that one device holds."""
  shards = [s for a in jax.tree.leaves(tree) for s in a.addressable_shards]
  sizes = [sum(s.data.size for s in shards if s.device == device) for device in jax.devices()]
  return max(sizes) / sum(a.size for a in jax.tree.leaves(tree))


def collectives(run):
  """Returns {program: {kind: [count, bytes]}} of the sampler."""
  labels = jax.ShapeDtypeStruct((BATCH,), np.int32, sharding=run.mesh.sharded)
  with run.mesh.activate():
    programs = run._sampler().lower(run.params, labels)
  texts = {name: program.compile().as_text() for name, program in programs.items()}
  costs = {name: cycles.cost(hlo.Program(text), 8) for name, text in texts.items()}
  return {
    name: {kind: [cost.count[kind], cost.bytes[kind]] for kind in cost.count}
    for name, cost in costs.items()
  }


def main():
  workdir, *names = sys.argv[1:]
  with mock.patch.object(jax, 'local_devices', lambda: jax.devices()[:1]):
    expected = evaluate(farmer_jax.load(workdir))
  results = {}
  for name in names:
    data, fsdp, tensor = map(int, name.split('x'))
    run = farmer_jax.load(workdir, overrides={'mesh.fsdp': fsdp, 'mesh.tensor': tensor})
    assert tuple(run.mesh.mesh.shape.values()) == (data, fsdp, tensor)
    share, found = largest_share(run.params), evaluate(run)
    results[name] = {
      'share': share,
      'differences': {
        key: abs(found[key] - value).reshape(BATCH, -1).max(1).tolist()
        for key, value in expected.items()
      },
      'scale': {key: float(abs(value).max()) for key, value in expected.items()},
      'collectives': collectives(run),
      'num_parameters': sum(a.size for a in jax.tree.leaves(run.params)),
    }
  print(json.dumps(results))


if __name__ == '__main__':
  main()
