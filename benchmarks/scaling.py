"""The table of docs/scaling.md, from what `--job=compile` has found.

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

COLUMNS = (
  'model',
  'devices',
  'batch',
  'remat',
  'parameters, M',
  'TFLOP a step',
  'memory a chip, GiB',
  'all-gather, GiB',
  'all-reduce, GiB',
  'step, ms',
  'images/s a chip',
  'MFU',
  'compiled in, s',
)


def row(path):
  """A row of the table, strings."""
  report = json.loads(path.read_text())
  step = report['programs']['training step']
  seconds, gib = step['estimated_seconds'], 2**30
  moved = {kind: found['bytes'] / gib for kind, found in step['collectives'].items()}
  return (
    path.parents[1].name,
    report['topology'],
    str(report['batch_size']),
    report['remat'],
    f'{report["parameters"] / 1e6:.0f}',
    f'{report["flops_per_step"] / 1e12:.0f}',
    f'{step["total_bytes"] / gib:.1f}' + ('' if step['fits'] else ' (too much)'),
    f'{moved.get("all-gather", 0):.1f}',
    f'{moved.get("all-reduce", 0) + moved.get("reduce-scatter", 0):.1f}',
    f'{seconds * 1e3:.0f}',
    f'{report["batch_size"] / report["devices"] / seconds:.0f}',
    f'{step["estimated_mfu"]:.0%}',
    f'{step["compile_seconds"]:.0f}',
  )


def main(argv):
  """Prints the table."""
  rows = [COLUMNS, ['---'] * len(COLUMNS), *(row(pathlib.Path(path)) for path in argv[1:])]
  for cells in rows:
    print(f'| {" | ".join(cells)} |')


if __name__ == '__main__':
  app.run(main)
