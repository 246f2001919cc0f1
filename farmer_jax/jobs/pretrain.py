"""`--job=pretrain`: trains flow and prior together, end to end."""

import functools

import jax

from farmer_jax import losses, terminal
from farmer_jax.evaluation import likelihood
from farmer_jax.jobs import training
from farmer_jax.nn import farmer
from farmer_jax.training import divergence, optimizer


def objective(config, model):
  """What is trained, and what training minimises: as `training.loop.train` takes them, a dict."""
  noise_std = optimizer.noise_std_schedule(config.noise, config.train.steps)
  return {
    'init_params': functools.partial(farmer.init_named_params, model=model),
    'loss_fn': functools.partial(losses.nll_loss, model=model, config=config, noise_std=noise_std),
  }


def diagnosis(config, model, mesh):
  """diagnose(params, batch, step), as `training.loop.train` takes it."""
  noise_std = optimizer.noise_std_schedule(config.noise, config.train.steps)
  extremes = jax.jit(
    functools.partial(losses.nll_extremes, model=model, config=config, noise_std=noise_std),
    out_shardings=mesh.whole,
  )

  def diagnose(params, batch, step):
    found = jax.device_get(extremes(params, batch, step - 1))
    return divergence.summary(found)

  return diagnose


def run(config, workdir):
  """Trains, validates and draws samples; prints where the results lie."""
  data = training.load_data(config)
  mesh = training.make_mesh(config)
  workdir = training.claim(config, workdir, data)
  model = farmer.build(config)
  _, valid, examples = training.train(
    config,
    workdir,
    data,
    mesh,
    model=model,
    evaluator=likelihood.LikelihoodEvaluator(model, config),
    diagnose=diagnosis(config, model, mesh),
    **objective(config, model),
  )
  if 'bits_per_dim' in valid:
    terminal.tell(f'Held-out likelihood ({examples} images): {valid["bits_per_dim"]:.3f} bits/dim')
  elif valid:
    figure = f'{valid["loss"]:.3f} nats/dim (density at noise σ = {valid["noise_std"]:g})'
    terminal.tell(f'Held-out likelihood ({examples} images): {figure}')
