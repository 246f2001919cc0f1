"""`--job=pretrain`: trains flow and prior together, end to end."""

import functools

from farmer_jax import objectives
from farmer_jax.evaluation import likelihood
from farmer_jax.jobs import training
from farmer_jax.nn import farmer
from farmer_jax.training import optimizer


def run(config, workdir):
  """Trains, validates and draws samples; prints where the results lie."""
  data = training.load_data(config)
  workdir = training.claim(config, workdir, data)
  model = farmer.build(config)
  noise_std = optimizer.noise_std_schedule(config.noise, config.train.steps)
  _, valid, examples = training.train(
    config,
    workdir,
    data,
    model=model,
    evaluator=likelihood.LikelihoodEvaluator(model, config),
    init_params=functools.partial(farmer.init_params, model=model),
    loss_fn=functools.partial(objectives.nll_loss, model=model, config=config, noise_std=noise_std),
  )
  if 'bits_per_dim' in valid:
    print(f'Held-out likelihood ({examples} images): {valid["bits_per_dim"]:.3f} bits/dim')
  elif valid:
    figure = f'{valid["loss"]:.3f} nats/dim (density at noise σ = {valid["noise_std"]:g})'
    print(f'Held-out likelihood ({examples} images): {figure}')
