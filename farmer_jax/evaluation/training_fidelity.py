"""Sample quality during training: compares samples of the current parameters with real images."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool, PyTree, UInt8

from farmer_jax import config as config_lib
from farmer_jax import sampling
from farmer_jax.distributed import mesh as mesh_lib
from farmer_jax.distributed import processes
from farmer_jax.evaluation import feature_networks, image_sets
from farmer_jax.nn.farmer import Farmer
from farmer_jax.xla import memory

# Fréchet distances, of which training can minimize the lowest, and other reported metrics.
_DISTANCES = ('fid', 'classifier_frechet_distance')
_OTHERS = ('precision', 'recall', 'classifier_precision', 'classifier_recall')

Images = UInt8[np.ndarray, 'n H W C']


class FidelityEvaluator:
  """Draws samples for each guidance scale of `config.train`, and measures their quality.

  Image i depends only on the parameters, the section `sampling`, its label and i. All processes
  draw the samples together. Process 0 compares them with the real images.
  """

  def __init__(
    self,
    config: config_lib.Config,
    model: Farmer,
    mesh: mesh_lib.Mesh,
    class_names: Sequence[str],
    workdir: epath.Path,
  ):
    """`mesh` must be active when samples are drawn, but not here."""
    self._folder, self._class_names = workdir / 'fidelity', class_names
    fidelity = dataclasses.replace(config.fidelity, network=config.training_feature_network)
    self._config = config = dataclasses.replace(config, fidelity=fidelity)
    self._scales = config_lib.guidance_scales(config.train.fidelity_scales)
    labels = sampling.parse_labels(config, class_names)
    self._labels = np.resize(np.asarray(labels, np.int32), config.train.fidelity_count)
    self._batch_size = mesh.round_up(config.sampling.batch_size)
    # The scale is an argument of the guided sampler.
    self._plain, self._guided = (
      sampling.Sampler(
        model,
        config.with_sampling(guidance=config.sampling.guidance.with_scale(scale)),
        out_shardings=mesh.replicated,
      )
      for scale in (0.0, 1.0)
    )
    self._network: feature_networks.FeatureNetwork | None = None  # in process 0, once loaded
    self._reference: Any = None

  def load(self) -> None:
    """Loads the network and the statistics of the real images in process 0, unless they are loaded.

    WORKDIR/fidelity stores both. The first call of this object loads them otherwise.
    """
    processes.on_process_zero(self._load)

  def _load(self) -> None:
    if self._network is None:
      config, folder = self._config, self._folder
      with memory.explained(config, 'fidelity'):
        network = feature_networks.load(config, folder, self._class_names)
        self._reference, _ = feature_networks.load_reference(config, network, folder)
      self._network = network

  def __call__(self, params: PyTree) -> dict[str, float]:
    """Returns, in all processes, the metrics of samples with the given parameters.

    The names end in the guidance scale, for example `fid_scale_1.5`. See
    `feature_networks.FeatureNetwork.compare`.
    """
    metrics: dict[str, float] = {}
    for scale in self._scales:
      images, finite = self._draw(params, scale)
      if not finite.all():
        logging.warning(f'{(~finite).sum()} of {len(finite)} samples are not finite.')

      def compare(images: Images = images, scale: float = scale) -> None:
        # No program of a feature network spans processes.
        with memory.explained(self._config, 'fidelity'), mesh_lib.LocalDevices().activate():
          self._load()
          found = self._compare(images)
        metrics.update({f'{name}_scale_{scale:g}': value for name, value in found.items()})

      processes.on_process_zero(compare)
    return processes.gather(metrics)[0]

  def _draw(self, params: PyTree, scale: float) -> tuple[Images, Bool[np.ndarray, 'n']]:
    """Returns the images with a guidance scale, and which of them are finite."""
    sampler, count, size = (
      self._guided if scale else self._plain,
      len(self._labels),
      self._batch_size,
    )
    parts: list[Any] = []
    with memory.explained(self._config, 'samples during training'):
      for first in range(0, count, size):
        indices = np.arange(first, first + size, dtype=np.int32)
        labels = self._labels[indices % count]  # pads the last batch
        z = sampler.latents(params, labels, indices, scales=(scale, scale))
        samples = self._plain.images(params, z, labels)
        parts.append(jax.device_get((samples.images, samples.finite)))
    images, finite = (np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True))
    return images, finite

  def _compare(self, images: Images) -> dict[str, float]:
    assert self._network is not None
    fidelity, count = self._config.fidelity, len(images)
    samples = image_sets.ImageSet('samples', None, images.__getitem__, count, self._labels)
    statistics = self._network.statistics(samples, 'samples', fidelity.pairwise_images)
    found = self._network.compare(statistics, self._reference, fidelity.neighbors)
    return {
      name: value
      for name, value in found.items()
      if name in (*_DISTANCES, *_OTHERS) and value is not None
    }


def lowest_distance(metrics: dict[str, float]) -> float:
  """Returns the lowest Fréchet distance over the guidance scales."""
  return min(value for name, value in metrics.items() if name.startswith(_DISTANCES))
