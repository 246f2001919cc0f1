"""The autoregressive prior over latent tokens and its mixture heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from farmer_jax.nn import transformer
from farmer_jax.ops import mixture


class MixtureHead(nn.Module):
  """One linear layer from hidden states to K diagonal Gaussians over d channels."""

  components: int  # K
  channels: int  # d
  scale_floor: float
  dtype: jnp.dtype
  weights_stay: bool = False  # on many devices, see `transformer.Readout`

  @nn.compact
  def __call__(self, hidden):  # [..., width]
    """Returns a `Mixture` with the leading axes of `hidden`, float32 at least."""
    k, d = self.components, self.channels

    def spread_bias(key, shape, dtype):
      """Components start apart, so that they have something to divide between them."""
      means = 0.5 * jax.random.normal(key, (k * d,), dtype) if k > 1 else jnp.zeros((d,), dtype)
      log_scales = jnp.full((k * d,), -1.0 if k > 1 else 0.0, dtype)
      return jnp.concatenate([jnp.zeros((k,), dtype), means, log_scales]).reshape(shape)

    small = nn.initializers.truncated_normal(0.1)  # of an input of unit length
    head = transformer.Readout(
      k * (1 + 2 * d),
      self.dtype,
      kernel_init=small,
      bias_init=spread_bias,
      weights_stay=self.weights_stay,
      name='out',
    )
    out = head(hidden)
    logits, means, log_scales = jnp.split(out, [k, k * (1 + d)], axis=-1)
    means = means.reshape(*means.shape[:-1], k, d)
    log_scales = log_scales.reshape(means.shape)
    if self.scale_floor:
      log_scales = jnp.logaddexp(log_scales, jnp.log(self.scale_floor))
    return mixture.Mixture(logits, means, log_scales)


class Prior(nn.Module):
  """p(z | c), factorised into informative tokens, one by one, and redundant tokens, all at once.

  The first `informative_channels` of each token form the sequence z^I that the transformer reads,
  after `condition_copies` copies of the class embedding. The state before token i gives that
  token's mixture; the state after the last token gives the one mixture shared by the redundant
  channels z^R of all tokens.
  """

  tokens: int  # N
  channels: int  # d
  layers: int
  width: int
  head_dim: int
  mlp_ratio: float
  num_classes: int  # class num_classes means "no class"
  condition_copies: int  # M
  components: int  # K_I
  informative_channels: int  # d_I
  redundant: str  # 'mixture' or 'normal'
  redundant_components: int  # K_R
  scale_floor: float
  dtype: jnp.dtype
  remat: str = 'none'
  unroll: int = 1

  def setup(self):
    float_dtype = transformer.param_dtype(self.dtype)
    small = nn.initializers.normal(0.02)
    self.class_embedding = transformer.class_embedding(
      self.num_classes, self.width, self.dtype, small
    )
    self.positions = self.param(
      'positions',
      transformer.named(small, None, 'embed'),
      (self.condition_copies + self.tokens, self.width),
      float_dtype,
    )
    self.in_proj = transformer.dense(self.width, self.dtype, axes=(None, 'embed'))
    self.transformer = transformer.Transformer(
      layers=self.layers,
      width=self.width,
      head_dim=self.head_dim,
      mlp_ratio=self.mlp_ratio,
      dtype=self.dtype,
      remat=self.remat,
      unroll=self.unroll,
    )
    head: dict[str, Any] = dict(scale_floor=self.scale_floor, dtype=self.dtype)
    self.informative_head = MixtureHead(self.components, self.informative_channels, **head)
    if self._has_redundant_mixture:
      redundant_channels = self.channels - self.informative_channels
      self.redundant_head = MixtureHead(
        self.redundant_components, redundant_channels, weights_stay=True, **head
      )

  @property
  def _has_redundant_mixture(self):
    return self.redundant == 'mixture' and self.informative_channels < self.channels

  def __call__(self, z, labels):  # [B, N, d], int [B]
    """Log-densities, nats: of the informative channels of each token [B, N], and of the redundant
    channels of all together [B]."""
    informative, redundant = jnp.split(z, [self.informative_channels], axis=-1)
    token_mixtures, shared_mixture = self.mixtures(informative, labels)
    log_informative = mixture.log_prob(token_mixtures, informative)
    if shared_mixture is not None:
      return log_informative, mixture.shared_log_prob(shared_mixture, redundant).sum(-1)
    return log_informative, mixture.standard_normal_log_prob(redundant).sum(-1)

  def mixtures(self, informative, labels):  # [B, N, d_I], int [B]
    """The N mixtures of the informative tokens [B, N, ...] and the shared one [B, ...], or None."""
    m = self.condition_copies
    # The last token is read only for the sake of the redundant ones.
    read = informative if self._has_redundant_mixture else informative[:, :-1]
    condition = self.class_embedding(labels)[:, None]
    condition = jnp.broadcast_to(condition, (len(informative), m, self.width))
    hidden = jnp.concatenate([condition, self.in_proj(read)], axis=1)
    hidden = self.transformer(hidden + self.positions[: hidden.shape[1]].astype(self.dtype))
    token_mixtures = self.informative_head(hidden[:, m - 1 : m - 1 + self.tokens])
    shared = self.redundant_head(hidden[:, -1]) if self._has_redundant_mixture else None
    return token_mixtures, shared

  def sample(self, labels, draws):  # int [S, B]
    """Draws z [B, N, d], one informative token after the other, the redundant ones at the end.

    Args:
      labels: the classes; or, for guidance, a second row of them (S = 2). All rows read the same
        tokens and run as one batch.
      draws: how tokens are drawn, see `sampling.Draws`: token(mixture [S, B, ...], i) -> [B, d_I],
        shared(mixture [S, B, ...], N) -> [B, N, d_R] and normal(N, d_R) -> [B, N, d_R].
    """
    m, streams = self.condition_copies, labels.shape
    labels = labels.reshape(-1)
    positions = self.positions.astype(self.dtype)
    layers = self.transformer.unstacked()
    cache = self.transformer.init_cache(len(labels), m)
    condition = self.class_embedding(labels)[:, None] + positions[:m]
    hidden, cache = self.transformer.extend(condition, layers, cache)

    def by_stream(parameters):  # [S·B, ...]
      return jax.tree.map(lambda a: a.reshape(*streams, *a.shape[1:]), parameters)

    def next_token(carry, i):
      hidden, cache = carry
      token = draws.token(by_stream(self.informative_head(hidden)), i)
      embedded = jnp.tile(self.in_proj(token), (streams[0], 1)) + positions[m + i]
      hidden, cache = self.transformer.extend(embedded[:, None], layers, cache, m + i)
      return (hidden[:, 0], cache), token

    hidden, informative = transformer.scan_tokens(
      next_token, hidden[:, -1], cache, jnp.arange(self.tokens)
    )
    informative = informative.swapaxes(0, 1)
    if self._has_redundant_mixture:
      redundant = draws.shared(by_stream(self.redundant_head(hidden)), self.tokens)
    else:
      redundant = draws.normal(self.tokens, self.channels - self.informative_channels)
    return jnp.concatenate([informative, redundant.astype(informative.dtype)], axis=-1)


class NormalPrior(nn.Module):
  """Independent standard normals in place of the autoregressive prior: with it the flow is
  TARFlow."""

  tokens: int
  channels: int
  dtype: jnp.dtype

  def __call__(self, z, labels):  # [B, N, d], int [B]
    """Log-densities as `Prior.__call__` gives them; every channel counts as informative."""
    del labels
    log_prob = mixture.standard_normal_log_prob(z)
    return log_prob, jnp.zeros_like(log_prob[:, 0])

  def sample(self, labels, draws):  # int [S, B]
    """Draws z [B, N, d]."""
    del labels
    z = draws.normal(self.tokens, self.channels)
    return z.astype(transformer.param_dtype(self.dtype))
