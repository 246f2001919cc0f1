"""`--job=compile`: compiles training ahead of time, for devices that need not be there, and says
what it takes."""

import json
import os
import re
import time

import jax
import numpy as np

from farmer_jax import errors, sampling, terminal
from farmer_jax.jobs import pretrain, training
from farmer_jax.nn import farmer
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import state as state_lib
from farmer_jax.training import step as step_lib
from farmer_jax.workdir import layout
from farmer_jax.xla import flops, hlo

STEP = 'training step'

# Operations whose share of the time is reported.
_COSTLIEST = 25


def run(config, workdir):
  """Compiles; prints a table and writes WORKDIR/compile/<devices>.json."""
  devices = _devices(config.compile.topology)
  spread = training.make_mesh(config, devices)
  workdir = training.claim_workdir(config, workdir)
  if jax.process_index():
    return
  report = {
    'devices': len(devices),
    'device_kind': devices[0].device_kind,
    'topology': config.compile.topology,
    'mesh': dict(spread.mesh.shape),
    'batch_size': config.train.batch_size,
    'remat': config.model.remat,
    'programs': {},
  }
  state, lowered = _lowered_step(config, spread)
  report['parameters'] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  report['flops_per_step'] = flops.training_step(config)
  programs = {STEP: lambda: lowered}
  if config.compile.sampler:
    sampler = _lowered_sampler(config, spread, state.params)
    programs |= {name: (lambda program=program: program) for name, program in sampler.items()}
  for name, program in programs.items():
    terminal.say(f'Compiling the {name} for {len(devices)} x {devices[0].device_kind} ...')
    options = step_lib.COMPILER_OPTIONS.get(devices[0].platform) if name == STEP else None
    report['programs'][name] = _compiled(name, program(), devices[0].device_kind, options)
  _add_utilisation(report)
  folder = workdir / 'compile'
  folder.mkdir(parents=True, exist_ok=True)
  name = re.sub(r'\W+', '-', config.compile.topology or f'{len(devices)}-local')
  shape = 'x'.join(map(str, spread.mesh.shape.values()))
  settings = f'{shape}-{config.train.batch_size}-{config.model.remat}-{config.model.dtype}'
  file = folder / f'{name}-{settings}.json'
  layout.write_atomically(file, json.dumps(report, indent=2) + '\n')
  _print_report(report)
  print(file)


def _devices(topology):
  """The devices of a TPU slice that is not attached, or those that are."""
  if topology is None:
    return jax.devices()
  from jax.experimental import topologies

  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # or libtpu waits for a cloud that is not there
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # two may compile: neither has a device
  try:
    return topologies.get_topology_desc(topology, platform='tpu').devices
  except Exception as error:  # libtpu is missing, or does not know the name; the types vary.
    reason = ' '.join(str(error).split())[:200]
    raise errors.ConfigError(
      f'cannot compile for config.compile.topology={topology} ({reason}); the name is as in'
      ' v5e:16x16, and the compiler comes with: pip install "farmer_jax[tpu]"'
    ) from error


def _lowered_step(config, spread):
  """The state as it would be, and the training step traced."""
  model = farmer.build(config)
  objective = pretrain.objective(config, model)
  optimizer = optimizer_lib.create(config.train)
  init = state_lib.initializer(objective['init_params'], optimizer, config.train.ema_decay)
  state = spread.abstract(jax.eval_shape(init, jax.random.key(0), {}))
  side, channels, size = config.data.image_size, config.data.channels, config.train.batch_size
  batch = {
    'image': jax.ShapeDtypeStruct((size, side, side, channels), np.uint8, sharding=spread.split),
    'label': jax.ShapeDtypeStruct((size,), np.int32, sharding=spread.split),
  }
  step_fn = step_lib.make_train_step(objective['loss_fn'], optimizer, config.train)
  return state, step_lib.lower(step_fn, spread, state, batch, {})


def _lowered_sampler(config, spread, params):
  """Prior and sequential inverse, each device drawing its share of config.sampling.batch_size."""
  size = spread.batch_size(config.sampling.batch_size)
  labels = jax.ShapeDtypeStruct((size,), np.int32, sharding=spread.split)
  return sampling.Sampler(farmer.build(config), config).lower(params, labels)


def _compiled(name, lowered, kind, options):
  """What a program takes on each device."""
  start = time.monotonic()
  try:
    compiled = lowered.compile(options)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = ' '.join(str(error).split())[:200]
    raise errors.ConfigError(
      f'the {name} does not fit into a device ({reason}); a smaller config.train.batch_size, a'
      ' larger config.mesh.fsdp or another config.model.remat takes less'
    ) from error
  seconds = time.monotonic() - start
  memory, cost = compiled.memory_analysis(), hlo.cost(compiled.as_text())
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  # Of the results, what is donated takes the place of arguments.
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  clock, room = flops.clock(kind), flops.memory(kind)
  total = arguments + temporaries + results
  return {
    'compile_seconds': round(seconds, 1),
    'argument_bytes': arguments,
    'temporary_bytes': temporaries,
    'result_bytes': results,
    'total_bytes': total,
    'fits': None if room is None else total < room,
    'collectives': {
      name: {'count': count, 'bytes': cost.bytes[name]} for name, count in cost.count.items()
    },
    'estimated_cycles': cost.cycles or None,
    'estimated_seconds': cost.cycles / clock if clock and cost.cycles else None,
    'loops_of_unknown_length': cost.unknown_loops,
    'instructions_without_estimate': cost.unknown_cycles,
    'costliest': {
      name: cycles / cost.cycles for name, cycles in cost.operations.most_common(_COSTLIEST)
    },
  }


def _add_utilisation(report):
  """The share of the devices' peak that the compiler's estimate of time implies."""
  step = report['programs'][STEP]
  peak = flops.peak(report['device_kind'])
  if peak and step['estimated_seconds']:
    rate = report['flops_per_step'] / report['devices'] / step['estimated_seconds']
    step['estimated_mfu'] = rate / peak


def _print_report(report):
  gib = 2**30
  print(
    f'{report["parameters"] / 1e6:.0f} million parameters,'
    f' {report["flops_per_step"] / 1e12:.1f} TFLOP a step of {report["batch_size"]} images, on'
    f' {report["devices"]} x {report["device_kind"]} as {report["mesh"]}, remat {report["remat"]}'
  )
  for name, found in report['programs'].items():
    print(f'{name}: compiled in {found["compile_seconds"]:.0f} s')
    fits = {None: '', True: '; it fits', False: '; IT DOES NOT FIT'}[found['fits']]
    print(
      f'  memory a device: {found["total_bytes"] / gib:.2f} GiB'
      f' (arguments {found["argument_bytes"] / gib:.2f},'
      f' temporaries {found["temporary_bytes"] / gib:.2f}){fits}'
    )
    for kind, collective in found['collectives'].items():
      print(f'  {kind}: {collective["count"]} of {collective["bytes"] / gib:.2f} GiB in all')
    if found['estimated_seconds']:
      mfu = f', {found["estimated_mfu"]:.0%} of the peak' if 'estimated_mfu' in found else ''
      print(
        f"  the compiler's estimate, without waiting for collectives or data:"
        f' {found["estimated_seconds"] * 1e3:.1f} ms{mfu}'
      )
