"""Prints the results table of docs/scaling.md from the reports of `--job=compile`.

The step is the compiler's estimate plus a model of the attention kernels (TPUs). The bound is the
roofline (all chips): with collectives that overlap completely, and without overlap.

    for model in 1.1b-p16 1.9b-p16 1.1b-p8 1.9b-p8; do for slice in v5e:16x16 h100:32x8; do
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
  """Returns the table row of a report, {column: cell}. An unknown value is an empty cell."""
  report = json.loads(path.read_text())
  step = report['programs']['training step']
  seconds, limits = step['estimated_seconds'], step['roofline']
  moved = {kind: collective['bytes'] / GIB for kind, collective in step['collectives'].items()}
  reduced = moved.get('all-reduce', 0) + moved.get('reduce-scatter', 0)
  rate = seconds and report['batch_size'] / report['devices'] / seconds
  bounds = limits['bound_seconds'], limits['bound_seconds_without_overlap']
  bound_mfus = limits.get('bound_mfu'), limits.get('bound_mfu_without_overlap')
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
    'attention': step['attention_kernel'],
    'step, ms': cell(seconds, '.0f', 1e3),
    'of which kernels, ms': cell(step['kernel_seconds'], '.0f', 1e3),
    'images/s per chip': cell(rate, '.0f'),
    'MFU': cell(step.get('estimated_mfu'), '.0%'),
    'bound, ms': ' to '.join(cell(bound, '.0f', 1e3) for bound in bounds),
    'MFU at the bound': ' to '.join(cell(mfu, '.0%') for mfu in bound_mfus),
    'compilation, s': f'{step["compile_seconds"]:.0f}',
  }


def cell(value, form, factor=1):
  """Returns a number as text, or an empty text for None."""
  return '' if value is None else format(value * factor, form)


def main(argv):
  """Prints the table."""
  timing.print_table(row(pathlib.Path(path)) for path in argv[1:])


if __name__ == '__main__':
  app.run(main)
