"""Layers and conventions that all modules share: dtypes, precision, sharding, rematerialization."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PyTree, Shaped

from farmer_jax.nn import scaling

# Activations that are stored for the backward pass instead of recomputed. `TransformerLayer` and
# `attention.attend` assign their names with `checkpoint_name`.
_save = jax.checkpoint_policies.save_only_these_names
REMAT_POLICIES = {
  'dots': _save('qkv', 'attention', 'attention_out', 'mlp_in'),
  'attention': _save('attention'),
  'layers': jax.checkpoint_policies.nothing_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


def param_dtype(dtype: DTypeLike) -> jnp.dtype:
  """Dtype of parameters and of accumulated products: float32, or float64 if `dtype` is float64."""
  return jnp.promote_types(dtype, jnp.float32)


def cast_params(params: PyTree, dtype: DTypeLike) -> PyTree:
  """Converts parameters, for example of a checkpoint, for transformers with another `dtype`."""
  return jax.tree.map(lambda a: a.astype(param_dtype(dtype)), params)


def precision(dtype: DTypeLike) -> jax.lax.Precision:
  """Precision of matrix products whose operands have `dtype`.

  With the default precision, TPUs round float32 operands to bfloat16 and GPUs round them to TF32.
  The inverse of the flow would then invert a slightly different flow. The cotangents of products of
  bfloat16 operands are float32. HIGHEST would make their backward pass six times as expensive.
  """
  return jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


def product(subscripts: str, a: Array, b: Array) -> Array:
  """`jnp.einsum` of two arrays with the same dtype, accumulated and returned in `param_dtype`."""
  wide = param_dtype(a.dtype)
  return jnp.einsum(subscripts, a, b, precision=precision(a.dtype), preferred_element_type=wide)


def target_platform() -> str:
  """Returns the platform that the current function is traced for: cpu, gpu or tpu."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def _dot_general(x: Array, kernel: Array, dimension_numbers: Any, **kwargs: Any) -> Array:
  """`lax.dot_general` of a dense layer. On CPUs, the leading axes of `x` are merged into one.

  XLA's CPU backend transposes activations in memory if the kernel's gradient contracts two axes.
  With one axis, training is nearly twice as fast. On TPUs, tokens are often the last axis in
  memory, so merging the axes would cause a transposition.
  """
  assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
  if target_platform() != 'cpu':
    return jax.lax.dot_general(x, kernel, dimension_numbers, **kwargs)
  flat = x.reshape(-1, x.shape[-1])
  y = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **kwargs)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


def logical_axes(
  initializer: nn.initializers.Initializer, *axes: str | None
) -> nn.initializers.Initializer:
  """Returns an initializer of parameters whose axes have logical names.

  `config.Mesh` maps the names to mesh axes. `embed` is the width of a transformer, `hidden` an
  inner axis of a layer (attention heads, hidden units of an MLP), and `outputs` the outputs of an
  output projection. An axis named None is replicated.
  """
  return nn.with_logical_partitioning(initializer, axes)


def shard_batch(x: Shaped[Array, 'B ...']) -> Shaped[Array, 'B ...']:
  """Constrains `x` to be sharded along its batch axis only.

  Without the constraint XLA may gather batches where it should gather parameters.
  """
  return nn.with_logical_constraint(x, ('batch', *(None,) * (x.ndim - 1)))


def bind_for_decoding(
  module: nn.Module, params: PyTree, *inputs: Any, sharded: tuple[str, ...] = ()
) -> Any:
  """Returns an unbound module bound to its parameters, for a loop over tokens.

  Each token reads all parameters. Devices that have different images of a batch first gather the
  parameters, once, and then decode without communication. Shards over other mesh axes (by default
  `tensor`) remain, and so do the submodules named in `sharded`. `inputs` are those of `__call__`.
  """
  rules: dict[str, Any] = dict(nn.get_logical_axis_rules())
  sizes = jax.sharding.get_abstract_mesh().shape
  batch_axes = {axis for axis in rules.get('batch', ()) if sizes.get(axis, 1) > 1}
  of_params = [axes for name, axes in rules.items() if name not in ('batch', 'group', 'members')]
  if not batch_axes.intersection(jax.tree.leaves(of_params)):
    return module.bind({'params': params})

  def gather(path: Any, box: Any, a: Array) -> Array:
    if path[0].key in sharded or not isinstance(box, nn.meta.AxisMetadata):
      return a
    spec: list[Any] = []
    sharding: Any = nn.logical_to_mesh(nn.get_partition_spec(box))
    for axes, size in itertools.zip_longest(sharding, a.shape):
      kept = tuple(axis for axis in jax.tree.leaves(axes) if axis not in batch_axes)
      spec.append(kept if size % math.prod(sizes[axis] for axis in kept) == 0 else None)
    return jax.lax.with_sharding_constraint(a, jax.sharding.PartitionSpec(*spec))

  boxes = jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']
  gathered = jax.tree_util.tree_map_with_path(
    gather, boxes, params, is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata)
  )
  return module.bind({'params': gathered})


def dense(
  features: int,
  dtype: DTypeLike,
  axes: tuple[str | None, str | None],
  kernel_init: nn.initializers.Initializer,
  use_bias: bool = True,
) -> nn.Dense:
  """Returns a dense layer that computes in `dtype`. `axes` are the logical axes of its kernel."""
  return nn.Dense(
    features,
    dtype=dtype,
    param_dtype=param_dtype(dtype),
    precision=precision(dtype),
    dot_general=_dot_general,
    kernel_init=logical_axes(kernel_init, *axes),
    bias_init=logical_axes(nn.initializers.zeros, axes[1]),
    use_bias=use_bias,
  )


class OutputProjection(nn.Module):
  """A dense layer that multiplies in `dtype`, accumulates in float32 or float64 and returns it.

  Its outputs are means and log-scales. Near a mean of 1, bfloat16 has steps of 1/128, which is far
  coarser than the narrowest mixture component.

  By default the devices gather the kernel, and each device computes the outputs of its own images.
  With `shard_outputs`, the devices gather the input vectors instead, and each device computes a
  shard of the outputs. This is cheaper if each image has one vector and many outputs.
  """

  features: int
  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  shard_outputs: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, '*lead width']) -> Float[Array, '*lead features']:
    """Projects the last axis. With `shard_outputs`, `x` must be [B, width]."""
    wide = param_dtype(self.dtype)
    kernel_init = logical_axes(self.kernel_init, 'embed', 'outputs')
    kernel = self.param('kernel', kernel_init, (x.shape[-1], self.features), wide)
    bias = self.param('bias', logical_axes(self.bias_init, 'outputs'), (self.features,), wide)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if self.shard_outputs:
      x = nn.with_logical_constraint(x, ('group', None))
      # The first of these two constraints also fixes the sharding of the gradient.
      kernel = nn.with_logical_constraint(kernel, ('embed', 'outputs'))
      kernel = nn.with_logical_constraint(kernel, (None, 'members'))
    out = bias + _dot_general(
      x,
      kernel,
      (((x.ndim - 1,), (0,)), ((), ())),
      precision=precision(self.dtype),
      preferred_element_type=wide,
    )
    if self.shard_outputs:
      out = shard_batch(nn.with_logical_constraint(out, ('group', 'members')))
    return out


def class_embedding(num_classes: int, width: int, dtype: DTypeLike) -> nn.Embed:
  """Returns an embedding of class labels. Label `num_classes` means "no class"."""
  return nn.Embed(
    num_classes + 1,
    width,
    dtype=dtype,
    param_dtype=param_dtype(dtype),
    embedding_init=logical_axes(scaling.EMBEDDING_INIT, None, 'embed'),
  )


def norm(dtype: DTypeLike, name: str | None = None, axis: str | None = 'embed') -> nn.RMSNorm:
  """Returns a root-mean-square normalization with statistics in float32 or float64.

  `axis` is the logical name of the normalized axis.
  """
  scale_init = logical_axes(nn.initializers.ones, axis)
  return nn.RMSNorm(dtype=dtype, param_dtype=param_dtype(dtype), scale_init=scale_init, name=name)


def scan_stack(
  module: type[nn.Module],
  length: int,
  unroll: int,
  remat: str,
  in_axes: Any,
  name: str,
  in_loop: bool = False,
) -> Callable[..., nn.Module]:
  """Returns a class for a stack of `length` modules, which one scan applies in sequence.

  Compile time does not grow with `length`. `__call__` of the module returns (carry, output).
  `in_axes` is passed to `nn.scan`. `remat` is `none` or a key of `REMAT_POLICIES`. The parameters
  of the stack have a leading axis whose logical name is `name`. `in_loop` says
  that another compiled loop contains the stack.
  """
  if remat != 'none':
    # A loop separates the forward from the backward pass. Without a loop, XLA would merge equal
    # operations of both, and so store what the backward pass should compute again.
    prevent_cse = unroll >= length and not in_loop
    module = nn.remat(module, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)
  return nn.scan(
    module,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=in_axes,
    length=length,
    unroll=min(unroll, length),
    metadata_params={nn.PARTITION_NAME: name},
  )
