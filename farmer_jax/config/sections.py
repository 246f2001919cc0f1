"""Every setting of every job: its default, its unit and its meaning."""

import dataclasses

from farmer_jax.config.fields import key, section


@dataclasses.dataclass(frozen=True)
class Data:
  """Where the images come from and how they are read."""

  source: str = key(
    'digits', 'digits, fashion_mnist, folder, synthetic, or the name of a TFDS data set'
  )
  path: str | None = key(
    None,
    'folder: the image folder; fashion_mnist: folder of the IDX .gz files; TFDS: its data_dir',
    changeable=True,
  )
  image_size: int = key(8, 'side of the square images, pixels; larger ones are resized and cropped')
  channels: int = key(1, '1 (grey) or 3 (RGB)', choices=(1, 3))
  num_classes: int = key(10, 'classes; 0 trains without labels', least=0)
  valid_fraction: float = key(
    0.1,
    'share held out for validation by sources that have no split of their own',
    least=0,
    below=1,
  )
  valid_split: str = key('test', 'TFDS: the name of the split used for validation')
  bad_files: str = key(
    'stop', 'folder: what to do about a file that is no image', choices=('stop', 'skip')
  )
  synthetic_examples: int = key(1024, 'synthetic: number of images')
  flip: bool = key(False, 'mirror training images at random')
  threads: int = key(2, 'threads that read images, in each process', changeable=True)
  prefetch: int = key(8, 'batches read ahead', changeable=True)
  workers: int = key(
    0,
    'worker processes that decode images which do not fit in memory; 0 uses threads alone',
    changeable=True,
    least=0,
  )
  max_bad_examples: int = key(
    10,
    'training images that may turn out unreadable on the way, in each process, and others be read'
    ' in their place, before the run stops',
    changeable=True,
    least=0,
  )
  max_worker_restarts: int = key(
    10, 'times that worker processes may die before the run stops', changeable=True, least=0
  )
  stall_seconds: float = key(
    60.0, 'waiting for a batch is reported whenever it has taken this long', changeable=True
  )
  stall_limit_seconds: float = key(
    1800.0, 'waiting this long for a batch stops the run; 0: never', changeable=True, least=0
  )


@dataclasses.dataclass(frozen=True)
class Noise:
  """How bytes become real numbers."""

  kind: str = key(
    'uniform',
    'uniform (dequantisation: gives bits/dim) or gaussian (annealed noise: for generation)',
    choices=('uniform', 'gaussian'),
  )
  std_start: float = key(
    0.1, 'gaussian: standard deviation at the first step, pixels in [-1, 1]', least=0
  )
  std_end: float = key(
    0.005, 'gaussian: standard deviation at the last step, and in evaluation', least=0
  )
  curriculum_std: float = key(
    0.0,
    'uniform: standard deviation of Gaussian noise added at the first step of training, falling to'
    ' none; evaluation has none',
    least=0,
  )
  curriculum_share: float = key(
    0.6, 'uniform: share of the training steps after which that noise is gone'
  )


@dataclasses.dataclass(frozen=True)
class Flow:
  """The autoregressive flow."""

  blocks: int = key(4, 'flow blocks T; 0 turns the flow off', least=0)
  layers: int = key(2, 'transformer layers in a block')
  width: int = key(128, 'width of the blocks')
  head_dim: int = key(64, 'width of an attention head')
  mlp_ratio: float = key(4.0, 'width of the MLP over the width of the block')
  final_permutation: bool = key(
    True, 'reverse the tokens once more between the last block and the prior'
  )
  class_conditional: bool = key(False, 'show the class to the flow too')
  max_log_scale: float = key(
    0.0,
    'smooth upper bound b of log σ; 0: none. Samples cannot overflow while blocks times b is below'
    ' 80',
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class Prior:
  """The autoregressive prior and its mixture heads."""

  kind: str = key(
    'mixture',
    'mixture (autoregressive Gaussian mixtures), or normal (independent standard normals: TARFlow)',
    choices=('mixture', 'normal'),
  )
  layers: int = key(2, 'transformer layers')
  width: int = key(128, 'width')
  head_dim: int = key(64, 'width of an attention head')
  mlp_ratio: float = key(4.0, 'width of the MLP over the width of the prior')
  condition_copies: int = key(8, 'copies M of the condition embedding before the sequence')
  components: int = key(16, 'mixture components K_I of the informative head')
  informative_channels: int = key(
    0,
    'informative channels d_I of a token, the first ones; 0 makes all of them informative',
    least=0,
  )
  redundant: str = key(
    'mixture',
    'density of the redundant channels: mixture (one an image, shared by its tokens) or normal',
    choices=('mixture', 'normal'),
  )
  redundant_components: int = key(64, 'mixture components K_R of the redundant head')
  scale_floor: float = key(1e-3, 'smallest standard deviation of a mixture component', least=0)


@dataclasses.dataclass(frozen=True)
class Model:
  """The model."""

  patch_size: int = key(2, 'side of a patch, pixels')
  label_dropout: float = key(
    0.1, 'probability that training replaces a label by "no class"', least=0, below=1
  )
  dtype: str = key(
    'float32',
    'dtype of the transformers; parameters, log-dets and mixtures stay at least float32',
    choices=('float32', 'bfloat16', 'float64'),
  )
  remat: str = key(
    'none',
    'what the backward pass computes again to save memory: none; dots (all but products with'
    ' weights, and attention); attention (all but attention); layers (all but the input of each'
    ' layer); full (all but the input of each flow block)',
    choices=('none', 'dots', 'attention', 'layers', 'full'),
  )
  scan_unroll: int = key(
    1, 'layers compiled in a row, of several flow blocks if need be: more of them may run faster'
  )
  flow: Flow = section(Flow)
  prior: Prior = section(Prior)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with warm-up and cosine decay."""

  learning_rate: float = key(2e-3, 'highest learning rate, reached after the warm-up')
  final_learning_rate: float = key(1e-6, 'learning rate at the last step', least=0)
  warmup_steps: int = key(50, 'steps of linear warm-up', least=0)
  b1: float = key(0.9, 'AdamW beta 1', least=0, below=1)
  b2: float = key(0.95, 'AdamW beta 2', least=0, below=1)
  weight_decay: float = key(
    0.03, 'decoupled weight decay of matrices; biases and embeddings have none', least=0
  )
  clip_norm: float = key(1.0, 'largest global gradient norm; 0 does not clip', least=0)


@dataclasses.dataclass(frozen=True)
class Train:
  """The training loop. Intervals count steps; 0 turns the thing off."""

  steps: int = key(1000, 'optimizer steps')
  batch_size: int = key(64, 'images a step, over all devices')
  accumulate: int = key(1, 'parts the batch is cut into; their gradients are averaged')
  ema_decay: float = key(
    0.0, 'decay of the running average of the parameters; 0 keeps none', least=0, below=1
  )
  log_every: int = key(20, 'interval of training metrics', changeable=True)
  validate_every: int = key(
    500, 'interval of validation; it also runs at the end', changeable=True, least=0
  )
  sample_every: int = key(
    500, 'interval of sample grids; one is also made at the end', changeable=True, least=0
  )
  checkpoint_every: int = key(
    500, 'interval of checkpoints; one is also written at the end', changeable=True, least=0
  )
  keep_checkpoints: int = key(2, 'newest checkpoints kept', changeable=True)
  keep_best: int = key(
    0,
    'checkpoints kept beside these for their validation loss, the lowest, among those of steps at'
    ' which validation ran',
    changeable=True,
    least=0,
  )
  keep_every: int = key(
    0, 'checkpoints of steps divisible by this are kept for good', changeable=True, least=0
  )
  max_norm_ratio: float = key(
    30.0,
    'an update is left out where the norm of its gradient is so many times the running mean of'
    ' those before; 0: only where loss or gradient are not finite',
    least=0,
  )
  max_skipped: int = key(
    10,
    'updates left out in a row after which the run goes back to its newest checkpoint, and on with'
    ' other data',
    changeable=True,
  )
  max_returns: int = key(
    3,
    'times that the run goes back before it stops, with a diagnosis',
    least=0,
    changeable=True,
  )
  valid_batch_size: int = key(250, 'images a validation batch')
  valid_examples: int | None = key(
    None, 'validation images used; None uses the whole split', changeable=True
  )
  optimizer: Optimizer = section(Optimizer)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How training is spread over devices: their axes, and over which of these what is split.

  Batches are split over data and fsdp. Results change by rounding alone.
  """

  data: int = key(0, 'devices along the axis data; 0: all that are left', least=0, changeable=True)
  fsdp: int = key(1, 'devices along the axis fsdp; 0: all that are left', least=0, changeable=True)
  tensor: int = key(
    1, 'devices along the axis tensor; 0: all that are left', least=0, changeable=True
  )
  embed: str = key(
    'fsdp',
    'axes, with commas, that split parameters along the width of a transformer',
    changeable=True,
  )
  hidden: str = key(
    'tensor',
    'the same along what is wider inside of a layer: attention heads, the middle of an MLP',
    changeable=True,
  )
  outputs: str = key(
    'tensor', 'the same along what is read off: shifts, scales, mixtures', changeable=True
  )


@dataclasses.dataclass(frozen=True)
class Profile:
  """Recording what devices do."""

  steps: str = key(
    '',
    'first and last training step to be recorded, as in 10,15, into WORKDIR/profile, for'
    ' TensorBoard or XProf',
    changeable=True,
  )


@dataclasses.dataclass(frozen=True)
class Guidance:
  """Sampling from p_c^(1 + w) p_u^(-w), p_c being the prior for the class, p_u that for none."""

  method: str = key(
    'resample',
    'resample (pick among candidates), component (product of two Gaussians) or none',
    choices=('resample', 'component', 'none'),
    changeable=True,
  )
  scale: float = key(0.0, 'guidance scale w; 0 does not guide', least=0, changeable=True)
  final_scale: float | None = key(
    None,
    'w at the last token, approached along a line from scale at the first; None: scale throughout',
    least=0,
    changeable=True,
  )
  conditional_candidates: int = key(5, 'candidates a token from p_c', changeable=True)
  unconditional_candidates: int = key(5, 'candidates a token from p_u', changeable=True)
  redundant_candidates: int = key(
    128,
    'candidates for the redundant channels of an image, from p_c and from p_u each',
    changeable=True,
  )
  proposal_logits: float = key(
    1.0, 'factor on the mixture logits when drawing, with or without guidance', changeable=True
  )
  proposal_scales: float = key(
    1.0, 'factor on the standard deviations when drawing, with or without guidance', changeable=True
  )
  weighing_logits: float = key(
    1.0, 'resample: factor on the mixture logits when weighing candidates', changeable=True
  )
  weighing_scales: float = key(
    1.0, 'resample: factor on the standard deviations when weighing candidates', changeable=True
  )
  sharpening: float = key(1.0, 'resample: factor on the log-weights of candidates', changeable=True)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Drawing images. Image number i depends on the seed and i alone."""

  count: int = key(80, 'images that --job=sample draws', changeable=True)
  batch_size: int = key(64, 'images drawn together', changeable=True)
  labels: str = key(
    '',
    'classes by number or name, as in 3,3,7 or dog,cat; none for no class; they repeat until there'
    ' are enough. Empty: all classes in turn',
    changeable=True,
  )
  seed: int = key(0, 'seed of the samples', least=0, changeable=True)
  guidance: Guidance = section(Guidance)
  dtype: str | None = key(
    None,
    'dtype of the transformers; None: that of training, but float32 in place of bfloat16, in which'
    ' a deep flow is not inverted exactly',
    choices=(None, 'float32', 'bfloat16', 'float64'),
    changeable=True,
  )
  redundant_variance: float = key(
    1.0, 'factor on the variance of the redundant channels', least=0, changeable=True
  )
  inverse: str = key(
    'auto',
    'how the flow is inverted: sequential (token by token), parallel (all tokens by fixed-point'
    ' iteration), chunked (chunks of tokens, one after the other), auto (the fastest of these for'
    ' each block, measured once), or student (what --job=distill has trained: one pass a block)',
    choices=('auto', 'sequential', 'parallel', 'chunked', 'student'),
    changeable=True,
  )
  chunk: int = key(8, 'chunked: tokens in a chunk', changeable=True)
  tolerance: float = key(
    1e-5,
    'parallel, chunked, auto, refined student: change of a token, relative to 1 + its size, that'
    ' ends the iteration',
    changeable=True,
  )
  refinement_rounds: int = key(
    0,
    "student: passes of fixed-point iteration at each block, from the student's output on; with"
    ' many the inverse is exact, to within the tolerance',
    least=0,
    changeable=True,
  )
  denoise: bool = key(
    False,
    "models of Gaussian noise: move images by one step of the noise's variance up the density",
    changeable=True,
  )
  png: bool = key(False, 'also write each image as a PNG', changeable=True)
  figures: bool = key(
    False,
    'also draw sweeps of guidance and redundant variance and the path through the flow'
    ' into figures/',
    changeable=True,
  )
  per_class: int = key(
    8, 'images a class in a grid (of unconditional models: images a row)', changeable=True
  )
  max_classes: int = key(
    10, 'classes shown in a grid (of unconditional models: rows)', changeable=True
  )


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Scoring images one by one: what --job=likelihood does."""

  name: str | None = key(
    None, 'name of the results; None: made of the data and the settings', changeable=True
  )
  source: str | None = key(
    None,
    'data whose images are scored, as for data.source; None: those of the run',
    changeable=True,
  )
  path: str | None = key(None, 'where they are, as for data.path', changeable=True)
  split: str = key(
    'valid', 'which of them: train or valid', choices=('train', 'valid'), changeable=True
  )
  examples: int | None = key(
    None, 'images scored, from the first; None: the whole split', changeable=True
  )
  draws: int = key(1, 'draws of the noise for each image', changeable=True)
  condition: str = key(
    'label',
    'label (given each image\'s class), none (under the model\'s "no class"), or marginal (class'
    ' unknown: the mean over classes, which also classifies)',
    choices=('label', 'none', 'marginal'),
    changeable=True,
  )
  noise_std: float | None = key(
    None,
    'models of Gaussian noise: its standard deviation here; None: noise.std_end',
    least=0,
    changeable=True,
  )
  dtype: str = key(
    'float32',
    "dtype of the transformers, whatever training's was",
    choices=('float32', 'bfloat16', 'float64'),
    changeable=True,
  )
  batch_size: int = key(250, 'images scored together, in each process', changeable=True)
  seed: int = key(0, 'seed of the noise', least=0, changeable=True)
  other_source: str | None = key(
    None,
    'other data, to be told apart by their likelihood; needs a condition other than label',
    changeable=True,
  )
  other_path: str | None = key(None, 'where they are, as for data.path', changeable=True)
  other_split: str = key(
    'valid', 'which of them: train or valid', choices=('train', 'valid'), changeable=True
  )


@dataclasses.dataclass(frozen=True)
class Fidelity:
  """Comparing samples with real images: what --job=fidelity does."""

  name: str | None = key(
    None, 'name of the results; None: made of the samples and the settings', changeable=True
  )
  samples: str | None = key(
    None,
    'images to judge: an npz with arr_0, a folder of those, or a folder of images; None: drawn from'
    ' the run, as config.sampling says',
    changeable=True,
  )
  count: int = key(50_000, 'samples to judge', changeable=True)
  reference: str | None = key(
    None,
    'what to compare with: images as for samples, or an npz with mu and sigma; None: data of the'
    ' run',
    changeable=True,
  )
  split: str = key(
    'train', "which of the run's data: train or valid", choices=('train', 'valid'), changeable=True
  )
  reference_count: int | None = key(
    None, 'images to compare with, from the first; None: all', changeable=True
  )
  network: str = key(
    'auto',
    'whose features are compared: inception, classifier (a small one, trained on the training'
    ' images), or auto (inception for images in colour from 32 pixels on)',
    choices=('auto', 'inception', 'classifier'),
    changeable=True,
  )
  weights: str | None = key(
    None, 'inception: path of pt_inception-2015-12-05-6726825d.pth', changeable=True
  )
  batch_size: int = key(100, 'images looked at together', changeable=True)
  compared: int = key(
    50_000,
    'images of either set, evenly spread, that KID, precision and recall compare one by one',
    changeable=True,
  )
  neighbours: int = key(3, 'precision and recall: nearest neighbours k', changeable=True)


@dataclasses.dataclass(frozen=True)
class Compile:
  """Compiling ahead of time: what --job=compile does."""

  topology: str | None = key(
    None,
    'TPU slice to compile for, as in v5e:16x16 or v5p:4x4x8, with no need to have it (needs'
    ' libtpu); None: the devices at hand',
    changeable=True,
  )
  sampler: bool = key(False, 'compile the sampler too', changeable=True)


@dataclasses.dataclass(frozen=True)
class Distill:
  """Teaching a student to undo the flow in one pass a block."""

  objective: str = key(
    'stages',
    "stages (each block's output is held to what passes between the teacher's blocks), or hidden"
    ' (a linear map of its hidden states is; only the last output is held to the image)',
    choices=('stages', 'hidden'),
  )
  input_noise: float = key(
    0.3,
    "largest standard deviation, drawn anew for each image, of the noise on the student's input",
    least=0,
  )
  drawn_share: float = key(
    0.0,
    'share of each batch that is drawn from the teacher, as config.sampling says, instead of being'
    ' real images',
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """The whole configuration."""

  name: str = key(
    'farmer', 'name of the run; the workdir is runs/<name> unless --workdir says otherwise'
  )
  job: str = key(
    'pretrain',
    'what to do',
    choices=('pretrain', 'distill', 'sample', 'likelihood', 'fidelity', 'compile'),
    changeable=True,
  )
  teacher: str | None = key(
    None, 'distill: workdir of the trained run whose flow is to be undone', changeable=True
  )
  seed: int = key(0, 'seed of initialisation, data order and noise', least=0)
  data: Data = section(Data)
  noise: Noise = section(Noise)
  model: Model = section(Model)
  train: Train = section(Train)
  mesh: Mesh = section(Mesh)
  profile: Profile = section(Profile)
  sampling: Sampling = section(Sampling)
  distill: Distill = section(Distill)
  likelihood: Likelihood = section(Likelihood)
  compile: Compile = section(Compile)
  fidelity: Fidelity = section(Fidelity)
