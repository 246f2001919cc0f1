"""A pre-norm transformer, causal or not, that runs whole sequences or goes on from a cache."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as kept

# What the backward pass may keep of a layer's or a block's forward pass.
_names = jax.checkpoint_policies.save_only_these_names
REMAT_POLICIES = {
  'dots': _names('qkv', 'attention', 'attention_out', 'mlp_in'),
  'attention': _names('attention'),
  'layers': jax.checkpoint_policies.nothing_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


# Keys and values of the tokens seen so far, [B, heads, N, head_dim] each, of each layer. An array
# for each layer: a slice of a stack of them would be copied at each step.
Cache = tuple[tuple[jax.Array, jax.Array], ...]


# Queries of a whole sequence that meet their keys together.
_QUERIES = 256

# Decoding compiles its loop for at most so many lengths of the cache, of at least so many tokens.
_SEGMENTS, _SEGMENT_TOKENS = 4, 64


def scan_tokens(step, carry, cache, inputs, tokens=1):
  """`lax.scan` over tokens, with a cache that grows: attention reads all of it, so it should not be
  much longer than what is known.

  Args:
    step: (carry, cache), inputs -> (carry, cache), outputs; it adds `tokens` tokens to the cache.
    carry: what is carried along beside the cache.
    cache: a `Cache` that is full, or None.
    inputs: arrays whose leading axis is scanned.
    tokens: see `step`.

  Returns:
    The last carry and the stacked outputs.
  """
  steps = len(jax.tree.leaves(inputs)[0])
  length = max(-(-steps // _SEGMENTS), -(-_SEGMENT_TOKENS // tokens))
  outputs = []
  for first in range(0, steps, length):
    part = jax.tree.map(lambda a, i=first: a[i : i + length], inputs)
    room = min(length, steps - first) * tokens
    cache = jax.tree.map(lambda a, n=room: jnp.pad(a, ((0, 0), (0, 0), (0, n), (0, 0))), cache)
    (carry, cache), out = jax.lax.scan(step, (carry, cache), part)
    outputs.append(out)
  return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _platform():
  """That of the devices that a function is traced for: cpu, gpu, tpu."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def _dot_general(x, kernel, dimension_numbers, **kwargs):
  """The product of a dense layer, with all leading axes of `x` merged into one on CPUs.

  XLA's CPU backend transposes activations in memory for the kernel's gradient when two axes are
  contracted; with one it does not, and training is nearly twice as fast. On TPUs tokens often are
  the last axis in memory, and merging axes would transpose them.
  """
  assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
  if _platform() != 'cpu':
    return jax.lax.dot_general(x, kernel, dimension_numbers, **kwargs)
  flat = x.reshape(-1, x.shape[-1])
  y = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **kwargs)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


def param_dtype(dtype):
  """Parameters are float32, or float64 where the computation is."""
  return jnp.promote_types(dtype, jnp.float32)


def precision(dtype):
  """That of products of `dtype` which are accumulated in float32. Of bfloat16 the cotangents are
  float32, which XLA would take as seriously as float32 weights, at six times the cost."""
  return jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else None


def dense(features, dtype, axes, kernel_init=nn.linear.default_kernel_init, use_bias=True):
  """A dense layer that computes in `dtype`; `axes` are the logical names of its kernel's."""
  return nn.Dense(
    features,
    dtype=dtype,
    param_dtype=param_dtype(dtype),
    dot_general=_dot_general,
    kernel_init=named(kernel_init, *axes),
    bias_init=named(nn.initializers.zeros, axes[1]),
    use_bias=use_bias,
  )


def named(initializer, *axes):
  """An initializer of parameters whose axes have these logical names: `config.Mesh` says over which
  devices each is split. The names are `embed` (width of a transformer), `hidden` (what widens
  inside of a layer), `outputs` (what is read off); None is never split."""
  return nn.with_logical_partitioning(initializer, axes)


def split_batch(x):
  """`x` with its leading axis split over the devices as batches are, and no other; says so to the
  compiler, which else might gather batches in place of weights."""
  return nn.with_logical_constraint(x, ('batch', *(None,) * (x.ndim - 1)))


class Readout(nn.Module):
  """A dense layer that multiplies in `dtype` but accumulates, adds its bias and answers in float32.

  What is read off a transformer are means and log-scales: bfloat16 has steps of 1/128 near a mean
  of 1, far coarser than the narrowest mixture component.

  Mostly each device reads off its own images, and the weights travel to it. Where an image is one
  vector and its outputs are many, the weights outweigh a batch: with `weights_stay` each device
  computes its part of the outputs for all images of its group (`runtime.mesh`), and vectors and
  outputs travel instead. The result is the same.
  """

  features: int
  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  weights_stay: bool = False

  @nn.compact
  def __call__(self, x):  # [..., width]; [B, width] where the weights stay
    """Returns [..., features], float32 at least."""
    wide = param_dtype(self.dtype)
    kernel_init = named(self.kernel_init, 'embed', 'outputs')
    kernel = self.param('kernel', kernel_init, (x.shape[-1], self.features), wide)
    bias = self.param('bias', named(self.bias_init, 'outputs'), (self.features,), wide)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if self.weights_stay:
      x = nn.with_logical_constraint(x, ('group', None))
      # Said twice, so that its gradient comes back to where the optimizer has it.
      kernel = nn.with_logical_constraint(kernel, ('embed', 'outputs'))
      kernel = nn.with_logical_constraint(kernel, (None, 'members'))
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    how: dict[str, Any] = dict(precision=precision(self.dtype), preferred_element_type=wide)
    out = bias + _dot_general(x, kernel, dimensions, **how)
    if self.weights_stay:
      out = split_batch(nn.with_logical_constraint(out, ('group', 'members')))
    return out


def class_embedding(num_classes, width, dtype, init=nn.linear.default_embed_init):
  """Embeddings of classes; that of class num_classes means "no class"."""
  return nn.Embed(
    num_classes + 1,
    width,
    dtype=dtype,
    param_dtype=param_dtype(dtype),
    embedding_init=named(init, None, 'embed'),
  )


def norm(dtype):
  """Root-mean-square normalisation; statistics in float32 at least."""
  scale_init = named(nn.initializers.ones, 'embed')
  return nn.RMSNorm(dtype=dtype, param_dtype=param_dtype(dtype), scale_init=scale_init)


def scan_stack(module, length, unroll, remat, in_axes, name):
  """`length` copies of `module`, parameters stacked along a leading axis, applied by one scan."""
  if remat != 'none':
    module = nn.remat(module, policy=REMAT_POLICIES[remat], prevent_cse=False)
  return nn.scan(
    module,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=in_axes,
    length=length,
    unroll=min(unroll, length),
    metadata_params={nn.PARTITION_NAME: name},
  )


class TransformerLayer(nn.Module):
  """Attention and an MLP, each behind a norm and around a residual.

  Neither has biases: each would cost a reduction over all activations in the backward pass, and
  kernels of its own to compile.
  """

  width: int
  head_dim: int
  mlp_ratio: float
  depth: int  # layers of the whole stack; the residual branches start at 1/sqrt(2 depth)
  dtype: jnp.dtype
  causal: bool = True  # whether a token sees none after it

  def setup(self):
    residual_init = nn.initializers.variance_scaling(
      1 / (2 * self.depth), 'fan_in', 'truncated_normal'
    )
    linear = functools.partial(dense, dtype=self.dtype, use_bias=False)
    self.attention_norm = norm(self.dtype)
    wider, narrower = ('embed', 'hidden'), ('hidden', 'embed')
    self.query, self.key, self.value = (linear(self.width, axes=wider) for _ in range(3))
    self.attention_out = linear(self.width, axes=narrower, kernel_init=residual_init)
    self.mlp_norm = norm(self.dtype)
    self.mlp_in = linear(int(self.mlp_ratio * self.width), axes=wider)
    self.mlp_out = linear(self.width, axes=narrower, kernel_init=residual_init)

  def __call__(self, x):  # [B, N, width]
    """Runs whole sequences; returns ([B, N, width], None), as a scan wants it."""
    return split_batch(self.extend(split_batch(x))[0]), None

  def extend(self, x, cache=None, position=0):  # x [B, n, width]
    """Runs the n tokens from `position` on. They see the tokens before them and themselves, or,
    where attention is not causal, all n.

    Args:
      x: hidden states.
      cache: keys and values, [B, heads, N, head_dim] each, of which those before `position` count;
        None where there are no earlier tokens and no later ones will follow.
      position: int scalar, may be traced.

    Returns:
      [B, n, width], and the cache with these tokens in it.
    """
    q, k, v = self._queries_keys_values(x)  # [B, h, n, D]
    if cache is not None:
      # Written before it is read: the other way round XLA copies the whole cache at each step.
      start = tuple(jnp.asarray(index, jnp.int32) for index in (0, 0, position, 0))
      k, v = (
        jax.lax.dynamic_update_slice(old, new, start)
        for old, new in zip(cache, (k, v), strict=True)
      )
    return self._finish(x, self._attend(q, k, v, position)), None if cache is None else (k, v)

  def _queries_keys_values(self, x):
    """Queries (scaled), keys and values of tokens, [B, heads, N, head_dim] each."""
    x = self.attention_norm(x)

    def in_heads(part):
      # Batched products want their matrices contiguous, so heads come before tokens.
      return part.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)

    q, k, v = (in_heads(kept(layer(x), 'qkv')) for layer in (self.query, self.key, self.value))
    return q / math.sqrt(self.head_dim), k, v

  def _attend(self, q, k, v, position):  # q [B, h, n, D], k and v [B, h, m, D]
    """Means of the values that each token sees, weighted by softmax, [B, n, width].

    Of long sequences so many queries at a time as there is fast memory for, each part with the keys
    that it may see.
    """
    n = q.shape[2]
    if not self.causal or n != k.shape[2] or n < 2 * _QUERIES:
      return self._attend_together(q, k, v, position)
    parts = []
    for start in range(0, n, _QUERIES):
      end = min(start + _QUERIES, n)
      parts.append(
        self._attend_together(q[:, :, start:end], k[:, :, :end], v[:, :, :end], position + start)
      )
    return jnp.concatenate(parts, axis=1)

  def _attend_together(self, q, k, v, position):
    """`_attend` for all queries at once.

    The weights are divided by their sums at the end, and the mask is added: of all that has n x m
    numbers the backward pass then needs the exponentials alone.
    """
    scores = _product('bhnd,bhmd->bhnm', q, k)
    if self.causal:
      visible = jnp.arange(k.shape[2]) <= position + jnp.arange(q.shape[2])[:, None]
      scores += jnp.where(visible, 0.0, -jnp.inf)
    highest = kept(jax.lax.stop_gradient(scores.max(-1, keepdims=True)), 'attention')
    weights = jnp.exp(scores - highest).astype(self.dtype)
    sums = _weighted_sums(weights, v)
    total = kept(sums[..., -1].transpose(0, 2, 1), 'attention')
    sums = sums[..., :-1].transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], self.width)
    heads = kept(sums.astype(self.dtype), 'attention').reshape(*total.shape, self.head_dim)
    # Inverted before it is spread over the head: a division takes the vector unit several steps.
    return (heads * (1 / total)[..., None]).astype(self.dtype).reshape(sums.shape)

  def _finish(self, x, heads):  # [B, N, width] each
    x = kept(x + self.attention_out(heads), 'attention_out')
    return x + self.mlp_out(jax.nn.gelu(kept(self.mlp_in(self.mlp_norm(x)), 'mlp_in')))


@jax.custom_jvp
def _weighted_sums(weights, v):  # [B, h, n, m], [B, h, m, D]
  """Sums of the values and, in the last column, of the weights alone: [B, h, n, D + 1], float32 at
  least. A column of ones beside the values makes both in one product."""
  return _product('bhnm,bhmd->bhnd', weights, _one_more_column(v, 1))


@_weighted_sums.defjvp
def _weighted_sums_jvp(primals, tangents):
  """Leaves out that the ones do not change, or the backward pass would cut their column off again,
  which takes TPUs longer than the product."""
  (weights, v), (weights_dot, v_dot) = primals, tangents
  by_values = _product('bhnm,bhmd->bhnd', weights, v_dot)
  by_weights = _product('bhnm,bhmd->bhnd', weights_dot, _one_more_column(v, 1))
  return _weighted_sums(weights, v), by_weights + _one_more_column(by_values, 0)


def _one_more_column(a, value):  # [B, h, n, D] -> [B, h, n, D + 1]
  return jnp.pad(a, ((0, 0),) * 3 + ((0, 1),), constant_values=value)


def _product(subscripts, a, b):
  """A product accumulated, and given, in float32 at least."""
  wide = param_dtype(a.dtype)
  return jnp.einsum(subscripts, a, b, precision=precision(a.dtype), preferred_element_type=wide)


class Transformer(nn.Module):
  """A stack of layers, scanned, and a final norm that makes vectors of about unit length.

  Unit length, not unit entries: the linear maps that read the result (a shift, a log-scale, a
  mixture) then move by about the learning rate times sqrt(width) at a step of Adam, not the
  learning rate times width. A shift has to become exact to a thousandth, and large steps keep it
  from that: this scaling admits larger learning rates for the layers.
  """

  layers: int
  width: int
  head_dim: int
  mlp_ratio: float
  dtype: jnp.dtype
  causal: bool = True
  remat: str = 'none'
  unroll: int = 1

  def setup(self):
    settings: dict[str, Any] = dict(
      width=self.width,
      head_dim=self.head_dim,
      mlp_ratio=self.mlp_ratio,
      depth=self.layers,
      dtype=self.dtype,
      causal=self.causal,
    )
    stack = scan_stack(TransformerLayer, self.layers, self.unroll, self.remat, (), 'layers')
    self.stack = stack(**settings)
    self.one_layer = TransformerLayer(**settings, parent=None)
    self.norm = norm(self.dtype)

  def __call__(self, x):  # [B, N, width]
    """Runs whole sequences; returns [B, N, width]."""
    return self._finish(self.stack(x)[0])

  def init_cache(self, batch, length):
    """An empty `Cache` with room for `length` tokens."""
    empty = jnp.zeros((batch, self.width // self.head_dim, length, self.head_dim), self.dtype)
    return ((empty, empty),) * self.layers

  def unstacked(self):
    """The parameters of each layer, for `extend`. To be taken apart once, outside the loop over
    tokens: inside, they would be copied at each token."""
    stack = self.stack.variables['params']
    return [jax.tree.map(lambda a, i=layer: a[i], stack) for layer in range(self.layers)]

  def extend(self, x, layers, cache=None, position=0):  # [B, n, width]
    """Runs the n tokens from `position` on, which see those before them in `cache`, if given.

    Args:
      x: [B, n, width].
      layers: what `unstacked` returns.
      cache: a `Cache` that has room for these tokens, or None.
      position: int scalar, may be traced.

    Returns:
      [B, n, width] and the cache with these tokens in it.
    """
    caches = []
    for params, known in zip(layers, cache or (None,) * self.layers, strict=True):
      x, known = self.one_layer.apply({'params': params}, x, known, position, method='extend')
      caches.append(known)
    return self._finish(x), None if cache is None else tuple(caches)

  def _finish(self, x):
    return self.norm(x) / math.sqrt(self.width)
