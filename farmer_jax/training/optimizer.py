"""The optimizer: AdamW with warm-up, cosine decay and gradient clipping. Skips bad updates."""

import jax
import optax

from farmer_jax import config
from farmer_jax.training import skipping


def learning_rate_schedule(train: config.Train) -> optax.Schedule:
  """Returns a schedule over the update count: linear warm-up, then cosine decay."""
  o = train.optimizer
  warmup = min(o.warmup_steps, train.steps - 1)
  return optax.warmup_cosine_decay_schedule(
    init_value=o.learning_rate / max(warmup, 1),
    peak_value=o.learning_rate,
    warmup_steps=warmup,
    decay_steps=train.steps,
    end_value=o.final_learning_rate,
  )


def create(train: config.Train) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer. Its `update` takes the loss as a keyword argument.

  Weight decay acts only on the kernels of linear layers.
  """
  o = train.optimizer

  def decay_mask(params: optax.Params) -> optax.Params:
    # Boxes lengthen the paths of parameters, so 'kernel' may not be the last key.
    return jax.tree_util.tree_map_with_path(
      lambda path, _: jax.tree_util.DictKey('kernel') in path, params
    )

  adamw = optax.adamw(
    learning_rate_schedule(train), o.b1, o.b2, weight_decay=o.weight_decay, mask=decay_mask
  )
  clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
  return skipping.skip_bad_updates(optax.chain(clip, adamw), train.max_grad_norm_ratio)
