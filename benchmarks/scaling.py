"""Prints the results table of docs/scaling.md from the reports of `--job=compile`.

    for model in 1.1b-p16 1.9b-p16 1.1b-p8 1.9b-p8; do for slice in v5e:16x16 v5p:4x4x8; do
      JAX_PLATFORMS=cpu python -m farmer_jax.main --job=compile --config=configs/in256.py:$model \
        --config.mesh.fsdp=16 --config.train.batch_size=2048 --config.compile.topology=$slice \
        --workdir=runs/compile/$model
    done; done
    python -m benchmarks.scaling runs/compile/*/compile/*.json
"""

import json
import pathlib

from absl import app

from benchmarks import timing

GIB = 2**30


def row(path):
  """Returns the table row of a report, {column: cell}."""
  report = json.loads(path.read_text())
  step = report['programs']['training step']
  seconds = step['estimated_seconds']
  moved = {kind: collective['bytes'] / GIB for kind, collective in step['collectives'].items()}
  reduced = moved.get('all-reduce', 0) + moved.get('reduce-scatter', 0)
  return {
    'model': path.parents[1].name,
    'devices': report['topology'],
    'batch': report['batch_size'],
    'remat': report['remat'],
    'parameters, M': f'{report["parameters"] / 1e6:.0f}',
    'TFLOP/step': f'{report["flops_per_step"] / 1e12:.0f}',
    'memory per chip, GiB': f'{step["total_bytes"] / GIB:.1f}'
    + ('' if step['fits'] else ' (too large)'),
    'all-gather, GiB': f'{moved.get("all-gather", 0):.1f}',
    'all-reduce, GiB': f'{reduced:.1f}',
    'step, ms': f'{seconds * 1e3:.0f}',
    'images/s per chip': f'{report["batch_size"] / report["devices"] / seconds:.0f}',
    'MFU': f'{step["estimated_mfu"]:.0%}',
    'compilation, s': f'{step["compile_seconds"]:.0f}',
  }


def main(argv):
  """Prints the table."""
  timing.print_table(row(pathlib.Path(path)) for path in argv[1:])


if __name__ == '__main__':
  app.run(main)
