"""AdamW and its schedules."""

import jax
import jax.numpy as jnp
import optax


def learning_rate_schedule(train):
  """Linear warm-up, then a cosine to the final learning rate; a function of the step."""
  o = train.optimizer
  warmup = min(o.warmup_steps, train.steps - 1)
  return optax.warmup_cosine_decay_schedule(
    init_value=o.learning_rate / max(warmup, 1),
    peak_value=o.learning_rate,
    warmup_steps=warmup,
    decay_steps=train.steps,
    end_value=o.final_learning_rate,
  )


def noise_std_schedule(noise, steps):
  """Standard deviation of the Gaussian noise of training, a function of the step.

  It falls along half a cosine: over the whole of training where the noise is the dequantisation
  (arXiv 2510.23588), and to nothing over a share of it where it only eases the start of training on
  uniformly dequantised images. There, flat regions soon have densities hundreds of times narrower
  than the rest, whose gradients drown what the model should learn about shapes.
  """
  if noise.kind == 'uniform':
    start, end, span = noise.curriculum_std, 0.0, noise.curriculum_share * steps
  else:
    start, end, span = noise.std_start, noise.std_end, steps

  def std(step):
    progress = jnp.clip(step / max(span - 1, 1), 0, 1)
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

  return std


def create(train):
  """Gradient clipping and AdamW; weight decay acts on the kernels of dense layers alone."""
  o = train.optimizer

  def decayed(params):
    # Parameters may be in boxes with the names of their axes, which lengthen the path.
    return jax.tree_util.tree_map_with_path(
      lambda path, _: jax.tree_util.DictKey('kernel') in path, params
    )

  adamw = optax.adamw(
    learning_rate_schedule(train), o.b1, o.b2, weight_decay=o.weight_decay, mask=decayed
  )
  return optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw) if o.clip_norm else adamw
