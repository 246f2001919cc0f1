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
  """Standard deviation of the Gaussian noise: half a cosine from start to end (FARMER §4.1)."""

  def std(step):
    progress = jnp.clip(step / max(steps - 1, 1), 0, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return noise.std_end + (noise.std_start - noise.std_end) * cosine

  return std


def create(train):
  """Gradient clipping and AdamW; weight decay acts on the kernels of dense layers alone."""
  o = train.optimizer

  def decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)

  adamw = optax.adamw(
    learning_rate_schedule(train), o.b1, o.b2, weight_decay=o.weight_decay, mask=decayed
  )
  return optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw) if o.clip_norm else adamw
