"""The autoregressive prior over latent tokens and its mixture heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from farmer_jax import config
from farmer_jax.nn import attention, layers, scaling, transformer
from farmer_jax.ops import guidance, mixture
from farmer_jax.ops.arrays import Labels, PerImage, PerToken, Tokens

# Tokens whose mixtures are in memory at the same time, with rematerialization.
_CHUNK_TOKENS = 128


class MixtureHead(nn.Module):
  """Maps hidden states to mixtures of K diagonal Gaussians over d channels.

  The means are linear in the hidden states. Logits and log-scales read normalized hidden states.
  """

  components: int
  channels: int
  scale_floor: float
  dtype: jnp.dtype
  shard_outputs: bool = False  # see `layers.OutputProjection`

  @nn.compact
  def __call__(self, hidden: Float[Array, '*lead width']) -> mixture.Mixture:
    """Returns mixtures with the leading axes of `hidden`, float32 or float64."""
    k, d = self.components, self.channels

    def project(name: str, x: Array, features: int, bias_init: Any) -> Array:
      return layers.OutputProjection(
        features, self.dtype, scaling.mixture_init, bias_init, self.shard_outputs, name=name
      )(x)

    normed = layers.norm(self.dtype, name='norm')(hidden)
    init = nn.initializers
    logits = project('logits', normed, k, init.zeros)
    # Components with different means can specialize.
    means = project('means', hidden, k * d, init.normal(0.5) if k > 1 else init.zeros)
    log_scales = project('log_scales', normed, k * d, init.constant(-1.0 if k > 1 else 0.0))
    means = means.reshape(*means.shape[:-1], k, d)
    log_scales = log_scales.reshape(means.shape)
    if self.scale_floor:
      log_scales = jnp.logaddexp(log_scales, jnp.log(self.scale_floor))
    return mixture.Mixture(logits, means, log_scales)


class Prior(nn.Module):
  """p(z | c) as a product of the informative and the redundant channels (arXiv 2510.23588).

  A transformer reads M copies of the class embedding and then the informative channels of the
  tokens. The output at the position before token i gives the mixture for the informative channels
  of token i. The output at the last token gives one mixture for all tokens' redundant channels.
  """

  prior: config.Prior
  stack_config: transformer.StackConfig
  num_tokens: int
  channels: int
  num_classes: int  # label num_classes means "no class"

  def setup(self) -> None:
    prior, stack = self.prior, self.stack_config
    self.class_embedding = layers.class_embedding(self.num_classes, stack.width, stack.dtype)
    self.positions = self.param(
      'positions',
      layers.logical_axes(scaling.EMBEDDING_INIT, None, 'embed'),
      (prior.condition_copies + self.num_tokens, stack.width),
      layers.param_dtype(stack.dtype),
    )
    self.in_proj = layers.dense(stack.width, stack.dtype, (None, 'embed'), scaling.MATRIX_INIT)
    self.transformer = transformer.Transformer(stack)
    informative = self.informative_channels
    head: dict[str, Any] = dict(scale_floor=prior.scale_floor, dtype=stack.dtype)
    self.informative_head = MixtureHead(prior.components, informative, **head)
    if self._has_redundant_mixture:
      self.redundant_head = MixtureHead(
        prior.redundant_components, self.channels - informative, shard_outputs=True, **head
      )

  @property
  def informative_channels(self) -> int:
    return self.prior.num_informative_channels(self.channels)

  @property
  def causal_inputs(self) -> transformer.CausalInputs:
    """What the transformer reads at each token. It also reads copies of the class embedding."""
    return transformer.CausalInputs.create(self.stack_config, self.num_tokens)

  @property
  def _has_redundant_mixture(self) -> bool:
    return self.prior.has_redundant_mixture(self.channels)

  def __call__(self, z: Tokens, labels: Labels) -> tuple[PerToken, PerImage]:
    """Returns log-densities in nats: per token (informative) and per image (redundant channels)."""
    informative, redundant = jnp.split(z, [self.informative_channels], axis=-1)
    hidden, last = self._hidden(informative, labels)
    log_informative = self._informative_log_prob(hidden, informative)
    if not self._has_redundant_mixture:
      return log_informative, mixture.standard_normal_log_prob(redundant).sum(-1)
    shared = self.redundant_head(last)
    return log_informative, mixture.shared_log_prob(shared, redundant).sum(-1)

  def mixtures(
    self, informative: Float[Array, 'B N d_I'], labels: Labels
  ) -> tuple[mixture.Mixture, mixture.Mixture | None]:
    """Returns mixtures [B, N, ...] of informative and [B, ...] (or None) of redundant channels."""
    hidden, last = self._hidden(informative, labels)
    shared = self.redundant_head(last) if self._has_redundant_mixture else None
    return self.informative_head(hidden), shared

  def _hidden(
    self, informative: Float[Array, 'B N d_I'], labels: Labels
  ) -> tuple[Float[Array, 'B N width'], Float[Array, 'B width']]:
    """Returns the hidden states before each token, and at the last token."""
    copies, width = self.prior.condition_copies, self.stack_config.width
    # Only the redundant channels depend on the last token.
    inputs = informative if self._has_redundant_mixture else informative[:, :-1]
    condition = self.class_embedding(labels)[:, None]
    condition = jnp.broadcast_to(condition, (len(informative), copies, width))
    inputs = self.causal_inputs.read(self.causal_inputs.pad(inputs))
    hidden = jnp.concatenate([condition, self.in_proj(inputs)], axis=1)
    positions = self.positions[: hidden.shape[1]].astype(self.stack_config.dtype)
    hidden = self.transformer(hidden + positions)
    return hidden[:, copies - 1 : copies - 1 + self.num_tokens], hidden[:, -1]

  def _informative_log_prob(
    self, hidden: Float[Array, 'B N width'], informative: Float[Array, 'B N d_I']
  ) -> PerToken:
    """Returns log-densities in nats. With rematerialization, in chunks of at most 128 tokens.

    The mixtures of a token have K_I (1 + 2 d_I) numbers, more than the activations of all layers.
    """
    tokens = self.num_tokens
    if self.stack_config.remat == 'none' or tokens <= _CHUNK_TOKENS:
      return mixture.log_prob(self.informative_head(hidden), informative)
    chunk_tokens = max(n for n in range(1, _CHUNK_TOKENS + 1) if tokens % n == 0)

    def chunk_log_prob(head: MixtureHead, carry: None, inputs: Any) -> tuple[None, Array]:
      chunk, z = inputs
      return carry, mixture.log_prob(head(chunk), z)

    def split(a: Array) -> Array:  # [B, N, ...] -> [B, chunks, chunk_tokens, ...]
      return a.reshape(len(a), -1, chunk_tokens, a.shape[-1])

    scanned = nn.scan(
      nn.remat(chunk_log_prob, prevent_cse=False),
      variable_broadcast='params',
      split_rngs={'params': False},
      in_axes=1,
      out_axes=1,
    )
    _, log_probs = scanned(self.informative_head, None, (split(hidden), split(informative)))
    return log_probs.reshape(len(hidden), tokens)

  def sample(
    self, labels: Int[Array, 'S B'], draws: guidance.GuidedDraws
  ) -> tuple[Tokens, guidance.EffectiveSizes]:
    """Draws latents: the informative channels token by token, then all redundant channels.

    All streams of labels read the drawn tokens and run as one batch. The streams of an image are
    neighbors, so that devices that share a batch have all streams of their images.
    """
    copies, (num_streams, batch) = self.prior.condition_copies, labels.shape
    labels = layers.shard_batch(labels.T).reshape(-1)
    positions = self.positions.astype(self.stack_config.dtype)
    layer_params = self.transformer.layer_params()
    empty = self.transformer.init_cache(len(labels), copies)
    condition = self.class_embedding(labels)[:, None] + positions[:copies]
    hidden, cache = self.transformer.extend(condition, layer_params, empty)

    def split_streams(mixtures: PyTree) -> PyTree:  # [B·S, ...] -> [S, B, ...]
      split = jax.tree.map(lambda a: a.reshape(batch, num_streams, *a.shape[1:]), mixtures)
      return jax.tree.map(lambda a: a.swapaxes(0, 1), split)

    def next_token(carry: Any, i: Array) -> tuple[Any, tuple[Array, Array | None]]:
      (hidden, past), cache = carry
      token, fraction = draws.token(split_streams(self.informative_head(hidden)), i)
      past = jnp.concatenate([past[:, 1:], token[:, None].astype(past.dtype)], axis=1)
      embedded = self.in_proj(self.causal_inputs.read(past)) + positions[copies + i]
      embedded = jnp.repeat(embedded, num_streams, axis=0)
      hidden, cache = self.transformer.extend(embedded, layer_params, cache, copies + i)
      return ((hidden[:, 0], past), cache), (token, fraction)

    wide = layers.param_dtype(self.stack_config.dtype)
    past = self.causal_inputs.pad(jnp.zeros((batch, 1, self.informative_channels), wide))
    (hidden, _), drawn = attention.scan_with_cache(
      next_token, (hidden[:, -1], past), cache, jnp.arange(self.num_tokens)
    )
    informative, fractions = jax.tree.map(lambda a: a.swapaxes(0, 1), drawn)
    shared_fraction = None
    if self._has_redundant_mixture:
      shared = split_streams(self.redundant_head(hidden))
      redundant, shared_fraction = draws.shared(shared, self.num_tokens)
    else:
      redundant = draws.normal(self.num_tokens, self.channels - self.informative_channels)
    z = jnp.concatenate([informative, redundant.astype(informative.dtype)], axis=-1)
    return z, guidance.EffectiveSizes(fractions, shared_fraction)


class NormalPrior(nn.Module):
  """Independent standard normals. A flow with this prior is a TARFlow (arXiv 2412.06329)."""

  num_tokens: int
  channels: int
  dtype: jnp.dtype

  def __call__(self, z: Tokens, labels: Labels) -> tuple[PerToken, PerImage]:
    """Returns log-densities like `Prior.__call__`. All channels are informative."""
    del labels
    log_prob = mixture.standard_normal_log_prob(z)
    return log_prob, jnp.zeros_like(log_prob[:, 0])

  def sample(
    self, labels: Int[Array, 'S B'], draws: guidance.GuidedDraws
  ) -> tuple[Tokens, guidance.EffectiveSizes]:
    """Draws latents."""
    del labels
    z = draws.normal(self.num_tokens, self.channels)
    return z.astype(layers.param_dtype(self.dtype)), guidance.EffectiveSizes()
