"""`--job=pretrain`: trains the flow and the prior jointly."""

import functools
from typing import Any

import jax
from etils import epath

from farmer_jax import config as config_lib
from farmer_jax import losses, terminal
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.evaluation import validation
from farmer_jax.jobs import training_job, training_run
from farmer_jax.nn import farmer
from farmer_jax.training import divergence
from farmer_jax.training import start as start_lib


def run(config: config_lib.Config, workdir: epath.PathLike) -> None:
  """Trains, validates and draws samples. Prints the results and their paths."""
  resources = training_run.Resources.load(config)
  start = start_lib.open_start(config, workdir, resources.train.class_names)
  training_run.check_branch(start, resources)
  config = training_run.with_extensions(config, workdir, start)
  workdir = training_run.prepare_workdir(config, workdir, resources)
  if start:
    start.announce(workdir)
  model = farmer.build(config)
  evaluator = validation.LikelihoodEvaluator(model, config)
  _, metrics = training_job.train(
    config,
    workdir,
    resources,
    model,
    evaluator,
    init_params=functools.partial(start_lib.init_boxed_params, model=model, start=start),
    loss_fn=functools.partial(losses.nll_loss, model=model, config=config),
    diagnose=_diagnosis(config, model, resources.mesh),
    start=start,
  )
  _report(metrics, resources.num_validated(config))


def _diagnosis(
  config: config_lib.Config, model: farmer.Farmer, mesh: mesh_lib.Mesh
) -> divergence.Diagnose:
  """Returns the function `diagnose` of `divergence.DivergenceMonitor`."""
  diagnostics = jax.jit(
    functools.partial(losses.nll_diagnostics, model=model, config=config),
    out_shardings=mesh.replicated,
  )

  def diagnose(params: Any, batch: Any, step: int) -> tuple[str, dict[str, Any]]:
    return divergence.summarize(jax.device_get(diagnostics(params, batch, step - 1)))

  return diagnose


def _report(metrics: dict[str, float], count: int) -> None:
  """Prints the held-out likelihood."""
  if 'bits_per_dim' in metrics:
    figure = f'{metrics["bits_per_dim"]:.3f} bits/dim'
  elif metrics:
    figure = f'{metrics["loss"]:.3f} nats/dim (density at noise σ = {metrics["noise_std"]:g})'
  else:
    return
  terminal.print_result(f'Held-out likelihood ({count} images): {figure}')
