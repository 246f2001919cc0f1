"""The flow of affine couplings of Jet (arXiv 2412.15129): its inverse takes one pass per block.

Channel letters: c the channels that a block reads, d - c the channels that it transforms.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from farmer_jax.nn import flow, layers
from farmer_jax.ops import affine
from farmer_jax.ops.arrays import Condition, PerImage, Tokens


def channel_permutation(channels: int, blocks: int) -> Int[np.ndarray, 'd']:
  """Returns the permutation of the blocks of a flow: the input channel of each output channel.

  Each block reads the first half of its input and transforms the second half. The permutation is
  random, except that a third of each half stays in its half, at positions from which the next
  permutation moves it to the other half. Three blocks in sequence therefore read and transform each
  channel at least once, and nearly all pairs of channels are in different halves in some block. If
  all channels changed halves, the halves would always have the same channels, so this is done only
  in flows of at most two blocks. If the permutation were uniform, some channels would stay in one
  half for many blocks.
  """
  # Trained parameters depend on the permutation. NumPy guarantees the stream of RandomState.
  rng, num_changed = np.random.RandomState(0), channels // 2
  num_read = channels - num_changed
  first, second = rng.permutation(num_read), num_read + rng.permutation(num_changed)
  # The numbers of channels that stay in the first half and in the second half.
  a = (num_read + 1) // 3 if blocks > 2 else channels % 2
  b = a - channels % 2
  permutation = np.empty(channels, int)
  permutation[first[a : 2 * a]], permutation[second[b : 2 * b]] = first[:a], second[:b]
  permutation[np.delete(second, np.s_[b : 2 * b])] = rng.permutation(first[a:])
  permutation[np.delete(first, np.s_[a : 2 * a])] = rng.permutation(second[b:])
  return permutation


class CouplingBlock(flow.AffineBlock):
  """One affine coupling of channels.

  A bidirectional transformer reads the first half of the channels of all tokens. It computes shift
  and log-scale of the second half. Then the block permutes the channels.
  """

  causal: bool = False

  def setup(self) -> None:
    self._make_layers(self.num_tokens, self.channels // 2)

  def __call__(self, x: Tokens, condition: Condition) -> tuple[Tokens, PerImage]:
    """Returns [x1, (x2 - shift) / scale] with permuted channels, and log|det dz/dx| in nats."""
    x1, x2 = self._split(x)
    z2, log_det = self._transform(affine.affine_forward, self._hidden(x, condition), x2)
    z = jnp.concatenate([x1, z2], axis=-1)[..., self._permutation]
    return layers.shard_batch(z), log_det

  def inverse(
    self, z: Tokens, condition: Condition, chunk_size: int = 1, tolerance: float = 0.0
  ) -> tuple[Tokens, flow.Convergence]:
    """Inverts `__call__` exactly, in one pass, with any settings. See `flow.FlowBlock.inverse`."""
    del chunk_size, tolerance
    z = z[..., np.argsort(self._permutation)]
    z1, z2 = self._split(z)
    x2 = self._transform(affine.affine_inverse, self._hidden(z, condition), z2)
    exact = jnp.zeros(len(z), z.dtype)
    return jnp.concatenate([z1, x2], axis=-1), flow.Convergence(exact, exact + 1)

  @property
  def _permutation(self) -> Int[np.ndarray, 'd']:
    return channel_permutation(self.channels, self.flow.blocks)

  def _hidden(self, x: Tokens, condition: Condition) -> Float[Array, 'B N width']:
    return super()._hidden(self._split(x)[0], condition)

  def _split(self, x: Tokens) -> tuple[Float[Array, 'B N c'], Float[Array, 'B N d-c']]:
    """Returns the channels that the transformer reads, and those that the block transforms."""
    num_read = self.channels - self.channels // 2
    return x[..., :num_read], x[..., num_read:]


class CouplingFlow(flow.Flow):
  """T coupling blocks.

  The latents have the channels in the order of x, so that the informative channels of the prior are
  the first channels of x: low frequencies, in the basis `dct`.
  """

  block_class = CouplingBlock

  @property
  def reversals(self) -> int:
    return 0

  def in_order(self, z: Tokens, blocks: int) -> Tokens:
    return z[..., np.argsort(self._order(blocks))]

  def latents(self, z: Tokens) -> Tokens:
    return self.in_order(z, self.flow.blocks)

  def final_output(self, z: Tokens) -> Tokens:
    return z[..., self._order(self.flow.blocks)]

  def _order(self, blocks: int) -> Int[np.ndarray, 'd']:
    """Returns the channel of x of each output channel of the first `blocks` blocks."""
    order = np.arange(self.channels)
    for _ in range(blocks):
      order = order[channel_permutation(self.channels, self.flow.blocks)]
    return order
