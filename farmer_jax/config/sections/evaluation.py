"""Keys of sampling and evaluation."""

import dataclasses
from typing import Literal

from farmer_jax.config.fields import Dtype, NonNegativeFloat, NonNegativeInt, NonNegativeOrNone


@dataclasses.dataclass(frozen=True)
class Guidance:
  """Sampling from a density proportional to p_c^(1 + w) p_u^(-w).

  p_c is the prior given the class, p_u is the prior given "no class", and w is the guidance scale.
  """

  method: Literal['resample', 'component', 'none'] = 'resample'
  """resample: draw candidates and choose one by its weight. component: multiply pairs of Gaussian
  components. none: no guidance."""
  scale: NonNegativeFloat = 0.0
  """Guidance scale w at the first token. 0 disables guidance."""
  final_scale: NonNegativeOrNone = None
  """Guidance scale w at the last token. w changes linearly along the tokens. None uses scale."""
  conditional_candidates: int = 5
  """resample: candidates per token drawn from p_c."""
  unconditional_candidates: int = 5
  """resample: candidates per token drawn from p_u."""
  redundant_candidates: int = 128
  """resample: candidates per image for the redundant channels, drawn from p_c and from p_u each."""
  proposal_logit_factor: float = 1.0
  """Factor on the mixture logits when drawing, with or without guidance."""
  proposal_scale_factor: float = 1.0
  """Factor on the standard deviations when drawing, with or without guidance."""
  weighing_logit_factor: float = 1.0
  """resample: factor on the mixture logits when weighing candidates."""
  weighing_scale_factor: float = 1.0
  """resample: factor on the standard deviations when weighing candidates."""
  sharpening: float = 1.0
  """resample: factor on the log-weights of the candidates."""

  @property
  def scales(self) -> tuple[float, float]:
    """Guidance scales at the first and at the last token, or (0, 0) without guidance."""
    if self.method == 'none':
      return 0.0, 0.0
    return self.scale, self.scale if self.final_scale is None else self.final_scale

  def with_scale(self, scale: float) -> 'Guidance':
    """Returns a copy with this scale for all tokens. Resampling replaces the method none."""
    method = 'resample' if self.method == 'none' else self.method
    return dataclasses.replace(self, method=method, scale=scale, final_scale=None)

  @property
  def active(self) -> bool:
    """Whether samples are guided."""
    return any(self.scales)

  @property
  def resamples(self) -> bool:
    """Whether samples are guided by resampling."""
    return self.active and self.method == 'resample'


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling images. Image i depends only on the seed, its label and i."""

  count: int = 80
  """Number of images that --job=sample draws."""
  batch_size: int = 64
  """Images drawn at once."""
  labels: str = ''
  """Classes by index or name, separated by commas, for example 3,3,7 or dog,cat. none is "no
  class". The list repeats until it covers all images. Empty uses all classes in turn."""
  seed: NonNegativeInt = 0
  """Random seed of the samples."""
  guidance: Guidance = Guidance()
  dtype: Literal[Dtype, None] = None
  """Data type of the transformers. None uses model.dtype, but float32 instead of bfloat16, because
  bfloat16 does not invert a deep flow accurately."""
  redundant_variance: NonNegativeFloat = 1.0
  """Factor on the variance of the redundant channels."""
  inverse: Literal['auto', 'sequential', 'parallel', 'chunked', 'student'] = 'auto'
  """How the flow is inverted. sequential: token by token. parallel: all tokens at once, by
  fixed-point iteration. chunked: one chunk of tokens at a time, by fixed-point iteration. auto: the
  fastest of these for each flow block, measured once. student: one pass per flow block, by the
  student that --job=distill trained. Coupling flows have one exact inverse, whatever the value."""
  chunk_size: int = 8
  """chunked: tokens per chunk."""
  tolerance: float = 1e-5
  """Fixed-point iteration stops when no value x changes by more than this times 1 + |x|."""
  refinement_rounds: NonNegativeInt = 0
  """student: fixed-point iterations with the teacher's flow after the student's pass through each
  block. With many iterations, the inverse is exact to within the tolerance."""
  densities: bool = False
  """Compute the log-density and the log-determinant of each sample, before denoising. This takes
  one forward pass. They are always computed with figures=True, except for samples of a student of
  distill.denoise, whose densities have no meaning."""
  denoise: bool = False
  """noise.kind=gaussian: denoise each sample x by x + σ² ∇ log p(x), where σ is noise.std_end. No
  effect with inverse=student on a student of distill.denoise, which denoises by itself."""
  png: bool = False
  """Write each image as a PNG file, in addition to the npz files."""
  figures: bool = False
  """Draw figures into WORKDIR/figures: samples for a range of guidance scales, for a range of
  redundant variances, at each flow block, and by log-determinant."""
  grid_columns: int = 8
  """Columns of a sample grid. With classes: images per class."""
  grid_rows: int = 10
  """Largest number of rows of a sample grid. With classes: one class per row."""


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Likelihood of individual images: --job=likelihood."""

  name: str | None = None
  """Name of the result files. None builds a name from the data set and the settings."""
  source: str | None = None
  """Data set to score, with the values of data.source. None uses data.source."""
  path: str | None = None
  """Location of the data set, with the values of data.path. None uses data.path."""
  split: Literal['train', 'valid'] = 'valid'
  """Split to score: train or valid."""
  examples: int | None = None
  """Number of images to score, from the start of the split. None scores all images."""
  draws: int = 1
  """Noise draws per image."""
  condition: Literal['label', 'none', 'marginal'] = 'label'
  """Condition of the density. label: the class of the image. none: "no class". marginal: the mean
  density over all classes. It also gives the accuracy of the model as a classifier."""
  noise_std: NonNegativeOrNone = None
  """noise.kind=gaussian: standard deviation for pixels in [-1, 1]. None uses noise.std_end."""
  dtype: Dtype = 'float32'
  """Data type of the transformers, in place of model.dtype."""
  batch_size: int = 250
  """Images scored at once, per process."""
  seed: NonNegativeInt = 0
  """Random seed of the noise."""
  ood_source: str | None = None
  """Out-of-distribution detection: second data set to score, with the values of data.source.
  Requires condition=none or marginal if the model has classes. None scores only one data set."""
  ood_path: str | None = None
  """Location of the out-of-distribution data set, with the values of data.path."""
  ood_split: Literal['train', 'valid'] = 'valid'
  """Split of the out-of-distribution data set: train or valid."""


@dataclasses.dataclass(frozen=True)
class Fidelity:
  """Sample quality (FID, Inception Score, KID, precision, recall): --job=fidelity."""

  name: str | None = None
  """Name of the result files. None builds a name from the samples and the settings."""
  samples: str | None = None
  """Samples to evaluate: an npz file with arr_0, a folder of such files, or a folder of images.
  None draws samples from the run with the settings of config.sampling."""
  count: int = 50_000
  """Number of samples to evaluate."""
  reference: str | None = None
  """Reference images: an npz file with arr_0, a folder of such files, a folder of images, or an npz
  file with the statistics mu and sigma. None uses the data of the run."""
  reference_split: Literal['train', 'valid'] = 'train'
  """Split of the data of the run that is the reference: train or valid."""
  reference_count: int | None = None
  """Number of reference images, from the first image. None uses all images."""
  network: Literal['auto', 'inception', 'classifier'] = 'auto'
  """Network that computes features. inception: Inception-v3. classifier: a small classifier trained
  on the training images of the run. auto: inception for RGB images of at least 32×32 pixels,
  classifier for all other images."""
  weights: str | None = None
  """inception: path of the weights: an npz file from farmer_jax.evaluation.convert_inception, or
  pt_inception-2015-12-05-6726825d.pth, which requires PyTorch."""
  batch_size: int = 100
  """Images per batch of the network."""
  pairwise_images: int = 50_000
  """Largest number of images per set for KID, precision and recall, which compare pairs of images.
  Larger sets are subsampled at regular intervals."""
  neighbors: int = 3
  """Precision and recall: number of nearest neighbors k."""


@dataclasses.dataclass(frozen=True)
class Export:
  """Files for other programs and for the Hugging Face hub: --job=export."""

  path: str | None = None
  """Local folder of the export. None uses WORKDIR/export."""
  step: int | None = None
  """Step of the checkpoint. None uses the newest valid checkpoint."""
  license: str | None = None
  """License of the weights in the model card, as the hub spells it, for example apache-2.0. None
  says that the license is unknown."""
  max_file_gigabytes: float = 5.0
  """Largest size of a file of weights, in 10^9 bytes. Larger models have several files."""
