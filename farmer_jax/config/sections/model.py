"""Keys of the data, the noise and the model."""

import dataclasses
from typing import Literal

from farmer_jax.config.fields import (
  BelowOne,
  Changeable,
  Dtype,
  Fraction,
  NonNegativeFloat,
  NonNegativeInt,
)


@dataclasses.dataclass(frozen=True)
class Data:
  """Source of the images, and how they are read."""

  source: str = 'digits'
  """Data set: digits, fashion_mnist, folder, synthetic, or the name of a TFDS data set."""
  path: Changeable[str | None] = None
  """Location of the data. folder: the image folder. fashion_mnist: the folder of the IDX .gz files,
  or None to read from TFDS. TFDS: data_dir, or None for the default data_dir."""
  image_size: int = 8
  """Height and width of the images, pixels. Images of other sizes are resized and cropped."""
  channels: Literal[1, 3] = 1
  """Color channels: 1 (gray) or 3 (RGB)."""
  num_classes: NonNegativeInt = 10
  """Number of classes. 0 trains without labels."""
  valid_fraction: BelowOne = 0.1
  """Fraction of the images held out for validation, for sources without a validation split."""
  valid_split: str = 'test'
  """TFDS: name of the split used for validation."""
  layout: Changeable[Literal['auto', 'splits', 'classes']] = 'auto'
  """folder: meaning of subfolders with names such as train and val. splits: they are the splits,
  and other folders are ignored. classes: all subfolders are classes. auto: decide, or stop if both
  are possible."""
  unknown_classes: Changeable[Literal['stop', 'leave_out']] = 'stop'
  """What to do with images of a class that the trained run does not know: stop or leave out."""
  bad_files: Literal['stop', 'skip'] = 'stop'
  """folder: what to do with a file that is not a readable image: stop the job or skip the file."""
  synthetic_examples: int = 1024
  """synthetic: number of images."""
  flip: bool = False
  """Flip training images horizontally with probability 0.5."""
  threads: Changeable[int] = 2
  """Threads that read images, per process or per worker process."""
  prefetch: Changeable[int] = 8
  """Batches prepared ahead of the training step, per process or per worker process."""
  workers: Changeable[NonNegativeInt] = 0
  """Worker processes that decode images, for large data sets. 0: threads of the main process."""
  max_bad_examples: Changeable[NonNegativeInt] = 10
  """Largest number of different unreadable images per process. Training replaces them, and
  validation leaves them out. One more stops the run."""
  max_worker_restarts: Changeable[NonNegativeInt] = 10
  """Largest number of restarts after a worker process died. One more stops the run."""
  stall_warning_seconds: Changeable[float] = 60.0
  """Interval of the warnings while the run waits for a batch, seconds."""
  stall_limit_seconds: Changeable[NonNegativeFloat] = 1800.0
  """Longest wait for a batch before the run stops, seconds. 0 waits without limit."""


@dataclasses.dataclass(frozen=True)
class Noise:
  """Noise that turns 8-bit images into continuous values."""

  kind: Literal['uniform', 'gaussian'] = 'uniform'
  """uniform: dequantization, for likelihood in bits/dim. gaussian: additive noise whose standard
  deviation decreases during training, for generation."""
  std_start: NonNegativeFloat = 0.1
  """gaussian: standard deviation at the first step, for pixels in [-1, 1]."""
  std_end: NonNegativeFloat = 0.005
  """gaussian: standard deviation at the last step and in evaluation, for pixels in [-1, 1]."""
  curriculum_std: NonNegativeFloat = 0.0
  """uniform: standard deviation of additional Gaussian noise at the first training step. It
  decreases to 0. Evaluation never adds it."""
  curriculum_fraction: Fraction = 0.6
  """uniform: fraction of the training steps at which the additional noise reaches 0."""


@dataclasses.dataclass(frozen=True)
class Flow:
  """The flow."""

  kind: Literal['autoregressive', 'coupling'] = 'autoregressive'
  """autoregressive: each block transforms each token given the tokens before it. coupling: each
  block transforms half of the channels of all tokens given the other half, as in Jet. Its exact
  inverse takes one pass per block."""
  blocks: NonNegativeInt = 4
  """Number of flow blocks T. 0 removes the flow."""
  layers: int = 2
  """Transformer layers per flow block."""
  width: int = 128
  """Width of the transformers."""
  head_dim: int = 64
  """Width of one attention head."""
  mlp_ratio: float = 4.0
  """Hidden width of the MLP divided by the width of the transformer."""
  final_permutation: bool = True
  """Reverse the token order between the last flow block and the prior. No effect in coupling flows,
  which keep the order."""
  class_conditional: bool = False
  """Condition the flow on the class, in addition to the prior."""
  max_log_scale: NonNegativeFloat = 0.0
  """Smooth upper bound of the log-scale in each flow block. 0 is unbounded. Samples cannot overflow
  float32 if blocks times this bound is below 80."""


@dataclasses.dataclass(frozen=True)
class Prior:
  """The autoregressive prior and its mixture heads."""

  kind: Literal['mixture', 'normal'] = 'mixture'
  """mixture: autoregressive Gaussian mixtures. normal: independent normals, as in TARFlow."""
  layers: int = 2
  """Transformer layers."""
  width: int = 128
  """Width of the transformer."""
  head_dim: int = 64
  """Width of one attention head."""
  mlp_ratio: float = 4.0
  """Hidden width of the MLP divided by the width of the transformer."""
  condition_copies: int = 8
  """Number of copies M of the class embedding placed before the token sequence."""
  components: int = 16
  """Mixture components K_I of the informative head."""
  informative_channels: NonNegativeInt = 0
  """Number of informative channels d_I of a token: its first channels. The remaining channels are
  redundant. 0 makes all channels informative."""
  redundant_kind: Literal['mixture', 'normal'] = 'mixture'
  """Density of the redundant channels. mixture: one mixture per image. normal: standard normal."""
  redundant_components: int = 64
  """Mixture components K_R of the redundant head."""
  scale_floor: NonNegativeFloat = 1e-3
  """Smallest standard deviation of a mixture component."""

  def num_informative_channels(self, token_channels: int) -> int:
    """Returns the number of informative channels of a token with `token_channels` channels."""
    return self.informative_channels or token_channels

  def has_redundant_mixture(self, token_channels: int) -> bool:
    """Returns whether tokens with `token_channels` channels have a redundant mixture."""
    has_redundant = self.num_informative_channels(token_channels) < token_channels
    return self.kind == 'mixture' and self.redundant_kind == 'mixture' and has_redundant


@dataclasses.dataclass(frozen=True)
class Model:
  """The model: patches, transformers, flow and prior."""

  patch_size: int = 2
  """Height and width of a patch, pixels."""
  patch_basis: Literal['dct', 'pixels'] = 'dct'
  """Channels of a token. dct: the coefficients of a cosine transform of the patch, in luminance and
  color differences, from low to high frequencies. pixels: the pixels of the patch, as published."""
  label_dropout: BelowOne = 0.1
  """Probability that training replaces a label by "no class". Guidance needs a value above 0."""
  dtype: Dtype = 'float32'
  """Data type of the transformers. Parameters and densities use float32 or float64."""
  mlp: Literal['gelu', 'gated'] = 'gelu'
  """MLPs of the transformers. gelu: two matrices. gated: three matrices (SwiGLU) and two thirds of
  the hidden width, for about the same number of parameters."""
  qk_norm: bool = False
  """Normalize the queries and keys of each attention head. This bounds the attention logits, which
  can grow in long runs of large models."""
  neighborhood: bool = False
  """Causal transformers read, at each token, also the three neighbors of the predicted token in the
  row of tokens above it, and need not learn to attend to them. False: as published."""
  attention: Changeable[Literal['auto', 'xla', 'cudnn', 'splash']] = 'auto'
  """Attention over full sequences. cudnn: flash attention of cuDNN, on NVIDIA GPUs. splash: JAX's
  Pallas splash attention, on TPUs. xla: without a kernel. auto: the kernel of the devices, if the
  sequences are long enough. Only bfloat16 transformers use kernels. Where a kernel does not apply,
  the log says why, and XLA computes attention."""
  remat: Changeable[Literal['none', 'dots', 'attention', 'layers', 'full']] = 'none'
  """Rematerialization: what the backward pass recomputes to save memory. none: nothing. dots:
  everything except attention and matrix products with parameters. attention: everything except
  attention. layers: everything except the input of each transformer layer. full: everything except
  the input of each flow block. cuDNN's attention is always computed again."""
  scan_unroll: Changeable[NonNegativeInt] = 0
  """Transformer layers unrolled per iteration of the scan over layers. They can span several flow
  blocks. 0: up to 16 layers on CPUs (1 with rematerialization, which has no effect there if all
  layers are unrolled); on other devices all layers of a flow block or of the prior if there are at
  most 8, and 4 otherwise. Larger values can run faster and compile more slowly."""
  flow: Flow = Flow()
  prior: Prior = Prior()

  def mlp_width(self, section: Flow | Prior) -> int:
    """Returns the hidden width of the MLPs of the flow or of the prior."""
    width = section.mlp_ratio * section.width
    return int(width) if self.mlp == 'gelu' else max(1, round(width * 2 / 3 / 8)) * 8

  def num_tokens(self, image_size: int) -> int:
    """Returns the number of tokens N of a square image."""
    return (image_size // self.patch_size) ** 2

  def token_channels(self, image_channels: int) -> int:
    """Returns the number of channels d of a token."""
    return image_channels * self.patch_size**2
