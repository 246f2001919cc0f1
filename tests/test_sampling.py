"""Drawing: one row a class, reproducible, and nothing non-finite passes unseen."""

import jax
import numpy as np

from farmer_jax import config, sampling
from farmer_jax.jobs import pretrain
from farmer_jax.nn import farmer

MODEL = config.Model(
  patch_size=4,
  flow=config.Flow(blocks=1, layers=1, width=8, head_dim=8),
  prior=config.Prior(layers=1, width=8, head_dim=8, condition_copies=1, components=2),
)


def test_grid_has_a_row_a_class():
  labels = sampling.grid_labels(config.Config(sampling=config.Sampling(per_class=3)))
  np.testing.assert_array_equal(labels, np.repeat(np.arange(10)[:, None], 3, axis=1))
  unconditional = config.Config(data=config.Data(num_classes=0))
  assert sampling.grid_labels(unconditional).max() == 0


def test_draws_depend_on_the_seed_and_report_what_is_not_finite():
  built = config.Config(model=MODEL)
  model = farmer.build(built)
  params = pretrain.init_params(jax.random.key(0), model=model, config=built)
  labels = np.arange(4)
  draw = sampling.Sampler(model, built)
  images, finite = draw(params, labels)
  assert images.shape == (4, 8, 8, 1)
  assert images.dtype == np.uint8
  assert finite.all()
  np.testing.assert_array_equal(images, draw(params, labels)[0])
  other = config.Config(model=MODEL, sampling=config.Sampling(seed=1))
  assert (sampling.Sampler(model, other)(params, labels)[0] != images).any()
  broken = jax.tree.map(lambda a: a, params)
  broken['prior']['class_embedding']['embedding'] = (
    params['prior']['class_embedding']['embedding'].at[2].set(np.nan)
  )
  np.testing.assert_array_equal(draw(broken, labels)[1], [True, True, False, True])
