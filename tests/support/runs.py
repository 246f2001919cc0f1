"""A tiny run, for jobs to work on."""

from farmer_jax import config

CONFIG = config.Config(
  name='tiny',
  data=config.Data(source='digits', image_size=8),
  model=config.Model(
    patch_size=2,
    flow=config.Flow(blocks=2, layers=1, width=16, head_dim=8),
    prior=config.Prior(
      layers=1, width=16, head_dim=8, condition_copies=2, components=3, informative_channels=2
    ),
  ),
  train=config.Train(
    steps=3, batch_size=16, ema_decay=0.5, validate_every=0, sample_every=0, checkpoint_every=3
  ),
)
