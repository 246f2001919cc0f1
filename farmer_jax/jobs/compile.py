"""`--job=compile`: compiles training ahead of time and reports memory and estimated speed.

`config.compile.topology` can name TPUs or GPUs that are not attached.
"""

import functools
import re
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax import losses, sampling, terminal
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.jobs import training_run
from farmer_jax.nn import farmer
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import step as step_lib
from farmer_jax.workdir import layout
from farmer_jax.xla import ahead_of_time, flops, targets

STEP = 'training step'


def run(config: config_lib.Config, workdir: epath.PathLike) -> None:
  """Compiles the programs, prints a report and writes it to a JSON file in WORKDIR/compile."""
  devices = targets.devices(config.compile.topology)
  mesh, kind = training_run.make_mesh(config, devices), devices[0].device_kind
  config = training_run.with_recorded_extensions(config, workdir)
  workdir = training_run.prepare_workdir(config, workdir)
  if jax.process_index():
    return
  state, programs = _lower(config, mesh)
  report = {
    'devices': len(devices),
    'device_kind': kind,
    'topology': config.compile.topology,
    'mesh': dict(mesh.mesh.shape),
    'batch_size': config.train.batch_size,
    'remat': config.model.remat,
    'attention': config.model.attention,
    'scan_unroll': config.model.scan_unroll,
    'programs': {},
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    'flops_per_step': flops.training_step(config),
  }
  for name, lowered in programs.items():
    logging.info(f'Compiling the {name} for {len(devices)} x {kind} ...')
    options = step_lib.compiler_options(devices[0].platform) if name == STEP else None
    program = ahead_of_time.compile_and_measure(name, lowered, devices, options)
    report['programs'][name] = program
    if name == STEP:
      _add_mfu(program, report['flops_per_step'] / len(devices), flops.chip(kind))
    elif name == 'prior' or config.model.flow.kind == 'autoregressive':  # token by token
      _add_decoding(program, config.num_tokens, mesh.round_up(config.sampling.batch_size))
  where = re.sub(r'\W+', '-', config.compile.topology or f'{len(devices)}-local')
  shape = 'x'.join(map(str, mesh.mesh.shape.values()))
  # The hash separates the reports of all settings that a workdir accepts.
  key = layout.short_hash((config.model, config.mesh, config.compile, config.sampling))
  settings = f'{config.train.batch_size}-{config.model.remat}-{config.model.dtype}-{key}'
  file = workdir / 'compile' / f'{where}-{shape}-{settings}.json'
  layout.write_json(file, report)
  terminal.print_result(
    f'{report["parameters"] / 1e6:.0f} million parameters,'
    f' {report["flops_per_step"] / 1e12:.1f} TFLOP per step of {config.train.batch_size} images;'
    f' {len(devices)} x {kind}, mesh {report["mesh"]}, remat {config.model.remat}'
  )
  for name, program in report['programs'].items():
    terminal.print_result(ahead_of_time.describe(name, program))
  terminal.print_result(str(file))


def _add_mfu(program: dict[str, Any], model_flops: float, chip: flops.Chip) -> None:
  """Adds the model FLOPs utilization of the estimate and of the bounds. FLOPs are per device."""
  limits = program['roofline']
  for values, time, mfu in (
    (program, 'estimated_seconds', 'estimated_mfu'),
    (limits, 'bound_seconds', 'bound_mfu'),
    (limits, 'bound_seconds_without_overlap', 'bound_mfu_without_overlap'),
  ):
    if chip.peak_flops and values[time]:
      values[mfu] = model_flops / values[time] / chip.peak_flops


def _add_decoding(program: dict[str, Any], tokens: int, images: int) -> None:
  """Adds the memory traffic of a sampler program per token, and the bound of its time.

  The programs draw or invert one token of all images of a batch after the other. They read the
  parameters and the cache of keys and values for each token, the inverse in each flow block.
  """
  limits = program['roofline']
  seconds = limits['bound_seconds']
  program['decoding'] = {
    'images': images,
    'bytes_read_per_token': limits['bytes_read'] / tokens,
    'bound_seconds_per_image': None if seconds is None else seconds / images,
  }


def _lower(
  config: config_lib.Config, mesh: mesh_lib.Mesh
) -> tuple[step_lib.TrainState, dict[str, jax.stages.Lowered]]:
  """Returns the shapes of the training state, and the traced programs by name."""
  model, optimizer = farmer.build(config), optimizer_lib.create(config)
  init_params = functools.partial(farmer.init_boxed_params, model=model)
  init = step_lib.initializer(init_params, optimizer, config.train.ema_decay)
  state = mesh.abstract(jax.eval_shape(init, jax.random.key(0)))
  side, size = config.data.image_size, config.train.batch_size
  shape = size, side, side, config.data.channels
  batch = {
    'image': jax.ShapeDtypeStruct(shape, np.uint8, sharding=mesh.sharded),
    'label': jax.ShapeDtypeStruct((size,), np.int32, sharding=mesh.sharded),
  }
  loss_fn = functools.partial(losses.nll_loss, model=model, config=config)
  step_fn = step_lib.make_train_step(loss_fn, optimizer, config.train)
  programs = {STEP: step_lib.lower(step_fn, mesh, state, batch)}
  if config.compile.sampler:
    # Each device draws one shard of the batch.
    size = mesh.round_up(config.sampling.batch_size)
    labels = jax.ShapeDtypeStruct((size,), np.int32, sharding=mesh.sharded)
    with mesh.activate():  # Modules ask the mesh for the platform.
      programs |= sampling.Sampler(model, config).lower(state.params, labels)
  return state, programs
