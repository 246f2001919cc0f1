"""The Python API: load a trained run, then score, sample, encode and decode images.

    import farmer_jax

    run = farmer_jax.load('runs/quickstart')
    images = run.sample([0, 1, 2])             # uint8 [3, H, W, C], one image of each class
    scores = run.log_prob(images, [0, 1, 2])
    scores.nats, scores.bits_per_dim           # float [3] each
    z = run.encode(images, [0, 1, 2])          # latents [3, N, d]
    run.decode(z, [0, 1, 2])                   # equals `images`

Axis letters: B images, H = W pixels per side, C channels, N tokens, d channels of a token.
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util
from jaxtyping import Float, Int, PyTree, UInt8

from farmer_jax import config as config_lib
from farmer_jax import errors, noise, sampling, teacher
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.evaluation import likelihood, scoring
from farmer_jax.nn import farmer, layers, student
from farmer_jax.ops import units
from farmer_jax.workdir import layout
from farmer_jax.xla import memory

Images = UInt8[np.ndarray, 'B H W C']
Latents = Float[np.ndarray, 'B N d']
# Classes by index or name. None means "no class".
Labels = Sequence[int | str | None] | Int[np.ndarray, 'B']


@dataclasses.dataclass(frozen=True)
class LogProb:
  """Log-densities of images."""

  nats: Float[np.ndarray, 'B']
  # Estimates an upper bound on the length of a lossless code. None with Gaussian noise and for
  # samples, whose real values are not dequantized images.
  bits_per_dim: Float[np.ndarray, 'B'] | None
  log_det: Float[np.ndarray, 'B']  # log|det dz/dx| of the flow, in nats


def load(
  path: epath.PathLike, step: int | None = None, overrides: Mapping[str, Any] | None = None
) -> 'Run':
  """Opens the trained run in the workdir `path`. The parameters are restored at the first use.

  `path` can also be an export of --job=export (its folder, or a file of weights in it), or an
  export on the Hugging Face hub, hf://USER/NAME, which needs the package huggingface_hub.
  `step` None selects the checkpoint that is the newest valid one at the first use. `overrides` are
  settings by key, for example `{'sampling.guidance.scale': 1.5}`.

  Raises:
    WorkdirError: `path` is not the workdir of a run or an export, it cannot be downloaded, or an
      override affects training.
    CheckpointError: there is no checkpoint of `step`.
    ConfigError: an override has an unknown key or an invalid value.
  """
  workdir = layout.absolute(path)
  config = config_lib.from_config_dict(layout.read_config(workdir))
  # With job='sample', `config_lib.check` skips the checks of other jobs.
  config = dataclasses.replace(config, job='sample')
  if overrides:
    config = _with_overrides(config, overrides)
    config_lib.check(config)
  return Run(workdir, config, step)


class Run:
  """A trained run. `load` opens a run with its own configuration.

  Images are processed in batches of the configured size, on all devices of this process. The
  section `config.mesh` says how many devices share the parameters. Methods raise `DataError` if the
  images or latents have a wrong shape or dtype, or a label does not exist. `class_names` is () if
  the names are unknown.
  """

  def __init__(self, workdir: epath.PathLike, config: config_lib.Config, step: int | None = None):
    """Opens the run in `workdir`. `config` can change only settings that do not affect training.

    Raises:
      WorkdirError: `workdir` is not the workdir of a run, or `config` changes another setting.
      CheckpointError: there is no checkpoint of `step`.
      ConfigError: the model needs float64, and the 64-bit mode of JAX is off, or the mesh does not
        fit the devices of this process.
    """
    self.workdir, self.config, self._step = layout.open_run(config, workdir), config, step
    teacher.check_step(self.workdir, step)
    _require_x64('config.model.dtype', config.model.dtype)
    self.class_names: tuple[str, ...] = layout.read_class_names(self.workdir)
    self.trained_config = config_lib.from_config_dict(layout.read_config(self.workdir))
    # The devices of training may be others. A mesh that is set for this job must fit.
    self.mesh = mesh_lib.LocalDevices(config.mesh, adapt=config.mesh == self.trained_config.mesh)

  @functools.cached_property
  def model(self) -> farmer.Farmer:
    """The model. A distillation run has a `student.StudentFarmer`."""
    build = farmer.build if self.config.teacher is None else student.build
    return build(self.config)

  @property
  def params(self) -> PyTree:
    """Parameters for evaluation: the EMA if the run has one.

    A distillation run has the teacher's parameters and, under the key 'student', the student's.
    """
    return self._restored[0]

  @property
  def step(self) -> int:
    """Step of the restored checkpoint."""
    return self._restored[1]

  @contextlib.contextmanager
  def activate(self) -> Iterator[None]:
    """Context for programs that read `params`, which are sharded over `mesh`."""
    usage = functools.partial(memory.of_arrays, 'parameters per device', self.params)
    with self.mesh.activate(), memory.attributed(usage):
      yield

  @property
  def density(self) -> tuple[PyTree, int]:
    """Parameters of the density and their step. A distillation run uses its teacher."""
    return self._restored if self.config.teacher is None else self._teacher

  def log_prob(
    self, images: Images, labels: Labels | None = None, *, num_draws: int = 1, seed: int = 0
  ) -> LogProb:
    """Computes log-densities log p(x | c) of images.

    The density is defined on real-valued images, so noise is added first. The noise of image i
    depends only on `seed`, i and the index of the draw. Log-densities are averaged over `num_draws`
    draws. Without labels, all images are scored under "no class". The settings
    `config.likelihood.dtype`, `.noise_std` and `.batch_size` apply.
    """
    _require_x64('config.likelihood.dtype', self.config.likelihood.dtype)
    config = scoring.scoring_config(self.config)
    score = _loss_function(config, num_draws, seed)
    loss, log_det = self._map_images(score, 'likelihood', images, labels)
    has_bits = noise.build(config.noise).has_bits_per_dim
    dims = np.asarray(images[0]).size
    return LogProb(-loss * dims, units.bits_per_dim(loss) if has_bits else None, -log_det * dims)

  def sample(
    self, labels: Labels, *, seed: int = 0, guidance: float | config_lib.Guidance | None = None
  ) -> Images:
    """Draws one image per label. For a model without classes, pass `[None] * num_images`.

    Image i depends only on `seed`, i and label i. The settings of `config.sampling` apply. A number
    `guidance` is the guidance scale of all tokens. A `config.Guidance` replaces all guidance
    settings. The inverse of the flow is sequential and exact, unless `config.sampling.inverse` is
    'student'.

    Raises:
      ConfigError: the model does not support guidance.
    """
    sampler, batch = self._guided(labels, seed, guidance)
    return self._quantized(sampler, *batch)

  def sample_with_log_prob(
    self, labels: Labels, *, seed: int = 0, guidance: float | config_lib.Guidance | None = None
  ) -> tuple[Images, LogProb]:
    """Draws the images of `sample`. Also computes the log-densities log p(x | c) of the samples.

    x is the real-valued sample, before denoising and rounding to gray levels. Guidance changes the
    samples, but not the density.

    Raises:
      ConfigError: the model does not support guidance, or a student removes the noise of x.
    """
    if self.config.student_denoises:
      raise errors.ConfigError(
        'the student of this run removes the noise of samples, which then have no density; set'
        ' config.sampling.inverse=auto'
      )
    sampler, batch = self._guided(labels, seed, guidance)

    def draw(params: PyTree, labels: jax.Array, indices: jax.Array) -> Any:
      samples = sampler(params, labels, indices)
      terms = sampler.densities(params, samples.noisy, labels)
      return samples.images, samples.finite, terms['loss'], terms['log_det']

    images, finite, loss, log_det = self._in_batches(draw, 'sampling', *batch)
    _warn_nonfinite(finite)
    return images, LogProb(-loss * images[0].size, None, -log_det * images[0].size)

  def _guided(
    self, labels: Labels, seed: int, guidance: float | config_lib.Guidance | None
  ) -> tuple[sampling.Sampler, tuple[np.ndarray, np.ndarray]]:
    """Returns the sampler of `sample`, and the labels and indices of the images."""
    if labels is None:
      raise errors.DataError(
        'sampling needs one label per image; for images of "no class", pass [None] * num_images'
      )
    configured = self.config.sampling.guidance
    if guidance is None:
      guidance = configured
    elif not isinstance(guidance, config_lib.Guidance):
      guidance = configured.with_scale(float(guidance))
    sampler = self._sampler(seed=seed, guidance=guidance)
    indices = np.arange(len(labels), dtype=np.int32)
    return sampler, (self._label_numbers(labels, len(labels)), indices)

  def encode(self, images: Images, labels: Labels | None = None, *, seed: int = 0) -> Latents:
    """Adds noise to images and maps them to latents. Only a class-conditional flow uses the labels.

    The noise equals the first draw of `log_prob`, but `config.likelihood.noise_std` does not apply.
    """
    settings = self.config.sampling
    _require_x64('config.sampling.dtype', settings.dtype)
    model = sampling.in_sampling_dtype(self.model, settings)
    encode = _encoder(model, self.config.noise, seed)
    return self._map_images(encode, 'sampling', images, labels)

  def decode(self, latents: Latents, labels: Labels | None = None) -> Images:
    """Maps latents to images without a denoising step. This is the inverse of `encode`.

    With `config.sampling.inverse` 'student', a student of `config.distill.denoise` removes noise.
    """
    latents = np.asarray(latents)
    _check_array('latents', latents, 'float', (self.config.num_tokens, self.config.token_channels))
    sampler, label_numbers = self._sampler(denoise=False), self._label_numbers(labels, len(latents))
    return self._quantized(sampler.images, latents, label_numbers)

  @functools.cached_property
  def _restored(self) -> tuple[PyTree, int]:
    """All parameters, and the step of the checkpoint in `workdir`."""
    is_student = self.config.teacher is not None
    own, step = teacher.restore_params(self.config, self.workdir, self.mesh, self._step, is_student)
    return (self._teacher[0] | own if is_student else own), step

  @functools.cached_property
  def _teacher(self) -> tuple[PyTree, int]:
    params, record = teacher.restore_teacher(self.config, self.workdir, self.mesh)
    return params, record['step']

  def _sampler(self, **changes: Any) -> sampling.Sampler:
    """Returns a sampler with changed settings. Reuses compiled programs."""
    _require_x64('config.sampling.dtype', self.config.sampling.dtype)
    return _build_sampler(self.model, self.config.with_sampling(**changes))

  def _quantized(self, draw: Callable[..., sampling.Samples], *arrays: np.ndarray) -> Images:
    """Returns the images that `draw` samples. Warns if samples are not finite."""
    fields = operator.attrgetter('images', 'finite')
    images, finite = self._in_batches(lambda *args: fields(draw(*args)), 'sampling', *arrays)
    _warn_nonfinite(finite)
    return images

  def _map_images(
    self, function: Callable[..., Any], section: str, images: Images, labels: Labels | None
  ) -> Any:
    """Applies `function(params, images, labels, indices)` to batches of images."""
    images, data = np.asarray(images), self.config.data
    _check_array('images', images, 'uint8', (data.image_size, data.image_size, data.channels))
    indices = np.arange(len(images), dtype=np.int32)
    label_numbers = self._label_numbers(labels, len(images))
    return self._in_batches(function, section, images, label_numbers, indices)

  def _in_batches(self, function: Callable[..., Any], section: str, *arrays: np.ndarray) -> Any:
    """Applies `function(params, *batch)` to batches of rows, and joins the results on the host.

    All batches have one size, `batch_size` of the section, so that `function` is compiled once. The
    last batch is padded with copies of the last row.
    """
    count, batch_size = len(arrays[0]), config_lib.get(self.config, section).batch_size
    size = self.mesh.round_up(min(batch_size, count))
    parts = []
    with memory.explained(self.config, section), self.activate():
      for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        batch = self.mesh.shard(tuple(array[rows] for array in arrays))
        parts.append(jax.device_get(function(self.params, *batch)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)

  def _label_numbers(self, labels: Labels | None, count: int) -> Int[np.ndarray, 'B']:
    labels = [None] * count if labels is None else list(labels)
    if len(labels) != count or not count:
      raise errors.DataError(f'{len(labels)} labels for {count} images; pass one label per image')
    if None in labels:
      sampling.check_no_class(self.config)
    num_classes = self.config.data.num_classes
    numbers = [sampling.class_label(label, num_classes, self.class_names) for label in labels]
    return np.array(numbers, np.int32)


def _warn_nonfinite(finite: np.ndarray) -> None:
  if not finite.all():
    logging.warning(f'{(~finite).sum()} of {len(finite)} images are not finite.')


def _check_array(name: str, array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> None:
  """Raises DataError unless the array is a batch of rows with this dtype and shape."""
  if not array.dtype.name.startswith(dtype) or array.shape[1:] != shape or not len(array):
    raise errors.DataError(
      f'{name} are {array.dtype} {list(array.shape)}; this run needs {dtype}'
      f' [B, {", ".join(map(str, shape))}]'
    )


@functools.lru_cache(maxsize=16)
def _build_sampler(model: farmer.Farmer, config: config_lib.Config) -> sampling.Sampler:
  config_lib.check(config)
  return sampling.Sampler(model, config)


@functools.lru_cache(maxsize=16)
def _loss_function(config: config_lib.Config, num_draws: int, seed: int) -> Callable[..., Any]:
  """Returns a compiled function (params, images, labels, indices) -> loss, log_det in nats/dim."""
  scorer = likelihood.Scorer(farmer.build(config), config, num_draws, 'label', seed)
  return jax.jit(lambda *args: operator.itemgetter('loss', 'log_det')(scorer(*args)))


@functools.lru_cache(maxsize=16)
def _encoder(model: farmer.Farmer, settings: config_lib.Noise, seed: int) -> Callable[..., Any]:
  """Returns a compiled function (params, images, labels, indices) -> latents."""
  noise_model = noise.build(settings)

  def encode(params: PyTree, images: jax.Array, labels: jax.Array, indices: jax.Array) -> jax.Array:
    values = noise.evaluation_images(noise_model, images, indices, seed)
    params = layers.cast_params(params, model.config.dtype)
    return model.apply({'params': params}, values, labels, method='encode')[0]

  return jax.jit(encode)


def _with_overrides(config: config_lib.Config, overrides: Mapping[str, Any]) -> config_lib.Config:
  values = traverse_util.flatten_dict(config_lib.to_dict(config), sep='.')
  for path in overrides:
    if path not in values:
      raise errors.ConfigError(config_lib.unknown_key(path))
  return config_lib.from_config_dict(traverse_util.unflatten_dict({**values, **overrides}, sep='.'))


def _require_x64(key: str, dtype: str | None) -> None:
  if dtype == 'float64' and not jax.config.read('jax_enable_x64'):
    raise errors.ConfigError(
      f"{key}=float64 needs JAX's 64-bit mode; call jax.config.update('jax_enable_x64', True) first"
    )
