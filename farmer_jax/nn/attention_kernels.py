"""Attention kernels of libraries, which never write the scores to memory.

cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`, and JAX's Pallas
splash attention on TPUs. `choose` decides where they apply. The arrays are those of
`nn.attention`: queries, keys and values of one length, [B, h, n, D].
"""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib
from jaxtyping import Array, Float

Heads = Float[Array, 'B h n D']
Kernel = Literal['xla', 'cudnn', 'splash']
Setting = Literal['auto', 'xla', 'cudnn', 'splash']

# Shortest sequences for which `auto` takes a kernel. The scores of one head of a short sequence fit
# into fast memory, where the compiler keeps them without a kernel.
_MIN_TOKENS = {'cudnn': 128, 'splash': 512}
_DTYPES = (jnp.bfloat16,)
_MAX_CUDNN_HEAD_DIM = 128  # on all GPUs since A100

_LANES = 128  # Lanes of a TPU's registers. Blocks of splash attention are multiples of them.
_MAX_BLOCK = 512

# Runs Pallas kernels in Python, for tests on CPUs.
_INTERPRET = False


def choose(setting: Setting, q: Heads) -> Kernel:
  """Returns the kernel for a full pass over sequences like `q`. Logs the reason for `xla`, once."""
  if setting == 'xla':
    return 'xla'
  kind = _device_kind()
  kernel: Kernel = 'splash' if kind.startswith('TPU') else 'cudnn'
  reason = _reason_for_xla(setting, kernel, kind, q)
  # CPUs have no kernel, which nobody needs to know unless a kernel was asked for.
  if reason and (setting != 'auto' or kind != 'cpu'):
    wanted = kernel if setting == 'auto' else setting
    _log_once(f'Attention is computed by XLA instead of {wanted}: {reason}.')
  return 'xla' if reason else kernel


def _device_kind() -> str:
  """Returns the kind of the devices that the current function is traced for."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else jax.devices()[0].device_kind


def _compute_capability() -> float:
  """Returns the compute capability of the attached GPU. GPUs that are not attached are recent."""
  return float(getattr(jax.devices()[0], 'compute_capability', 'inf'))


def _reason_for_xla(setting: Setting, kernel: Kernel, kind: str, q: Heads) -> str | None:
  """Returns why `kernel`, the kernel of devices of this kind, does not apply, or None."""
  batch, heads, tokens, head_dim = q.shape
  if not kind.startswith(('TPU', 'NVIDIA')) or setting not in ('auto', kernel):
    return f'the devices are {kind}'
  if q.dtype not in _DTYPES:
    return f'the data type is {q.dtype}, and the kernel rounds products to bfloat16'
  if setting == 'auto' and tokens < _MIN_TOKENS[kernel]:
    return f'sequences of {tokens} tokens are short'
  if kernel == 'cudnn' and _compute_capability() < 8:
    return 'the GPU is older than Ampere'
  if kernel == 'cudnn' and (head_dim % 8 or head_dim > _MAX_CUDNN_HEAD_DIM):
    return f'the head dimension {head_dim} is not a multiple of 8 up to {_MAX_CUDNN_HEAD_DIM}'
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 'several devices are used without a mesh' if jax.device_count() > 1 else None
  for size, axes in zip((batch, heads), _partition_spec(), strict=False):
    shards = math.prod(mesh.shape[axis] for axis in jax.tree.leaves(axes))
    if size % shards:
      return f'{batch} images with {heads} heads cannot be divided among {dict(mesh.shape)}'
  return None


@functools.cache
def _log_once(message: str) -> None:
  logging.info(message)


def attend(kernel: Kernel, q: Heads, k: Heads, v: Heads, causal: bool) -> Heads:
  """Softmax attention of scaled queries by `kernel`, cudnn or splash."""
  if kernel == 'cudnn':
    return _cudnn(q, k, v, causal)
  function = functools.partial(splash, causal=causal, interpret=_INTERPRET)
  if jax.sharding.get_abstract_mesh().empty:
    return function(q, k, v)
  # The compiler cannot divide a Pallas kernel among devices.
  spec = _partition_spec()
  sharded = jax.shard_map(function, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
  return sharded(q, k, v)


def _partition_spec() -> Any:
  """Returns the sharding of [B, h, n, D]: images over data and fsdp, heads over tensor."""
  return nn.logical_to_mesh_axes(('batch', 'hidden', None, None))


def _cudnn(q: Heads, k: Heads, v: Heads, causal: bool) -> Heads:
  """cuDNN's flash attention. Its backward pass needs an even number of tokens."""
  (batch, _, tokens, _), (q, k, v) = q.shape, _pad_tokens(2, q, k, v)
  is_padded = q.shape[2] > tokens and not causal
  by_token = (a.swapaxes(1, 2) for a in (q, k, v))
  attended = jax.nn.dot_product_attention(
    *by_token,
    scale=1.0,
    is_causal=causal,
    key_value_seq_lengths=jnp.full(batch, tokens, jnp.int32) if is_padded else None,
    implementation='cudnn',
  )
  return attended.swapaxes(1, 2)[:, :, :tokens]


def splash(q: Heads, k: Heads, v: Heads, causal: bool, interpret: bool = False) -> Heads:
  """Splash attention of the images and heads on one device. The queries are already scaled."""
  (_, heads, tokens, _), (q, k, v) = q.shape, _pad_tokens(_LANES, q, k, v)
  padded = q.shape[2]
  block = max(size for size in range(_LANES, _MAX_BLOCK + 1, _LANES) if padded % size == 0)
  # With the tokens as the last axis in memory, a head dimension of 64 fills whole registers.
  layout = splash_lib.QKVLayout.SEQ_MINOR
  layouts: Any = dict(q_layout=layout, k_layout=layout, v_layout=layout)
  mask = (
    splash_lib.CausalMask((padded, padded)) if causal else splash_lib.FullMask((padded, padded))
  )
  kernel = splash_lib.make_splash_mha(
    splash_lib.MultiHeadMask([mask] * heads),
    block_sizes=splash_lib.BlockSizes(*(block,) * 8, **layouts),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name='attention',
    interpret=interpret,
  )
  segments = None
  if padded > tokens and not causal:
    is_padding = (jnp.arange(padded) >= tokens).astype(jnp.int32)
    segments = splash_lib.SegmentIds(is_padding, is_padding)
  attended = jax.vmap(lambda *image: kernel(*image, segment_ids=segments))(q, k, v)
  return attended[:, :, :tokens]


def _pad_tokens(multiple: int, *arrays: Heads) -> list[Float[Array, 'B h padded D']]:
  """Pads sequences to a multiple of tokens. Causal queries never see the padding behind them."""
  padding = -arrays[0].shape[2] % multiple
  return [jnp.pad(a, ((0, 0), (0, 0), (0, padding), (0, 0))) for a in arrays]
