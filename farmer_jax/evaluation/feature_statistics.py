"""How close a set of images is to another, by the features of a network that looks at both."""

import dataclasses

import flax.struct
import jax
import numpy as np

from farmer_jax import terminal
from farmer_jax.distributed import mesh
from farmer_jax.ops import frechet, sample_quality


@flax.struct.dataclass
class Outputs:
  """What a network makes of images."""

  pool: jax.Array  # [B, D], the features that distances are between
  logits: jax.Array  # [B, classes]
  spatial: jax.Array | None = None  # [B, S], features that keep places, where there are some


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What is kept of a set of images. Fréchet distances need no more than moments; a reference that
  somebody else computed may have nothing else."""

  pool: frechet.Moments
  spatial: frechet.Moments | None = None
  features: np.ndarray | None = None  # float32 [k, D], pool features of k of the images
  logits: np.ndarray | None = None  # float32 [n, classes], of all of them


class Extractor:
  """Runs images through a network, spread over the devices of this process.

  Args:
    network: network(params, uint8 [B, H, W, C]) -> `Outputs`.
    params: its parameters.
    batch_size: images treated together.
  """

  def __init__(self, network, params, batch_size):
    self._devices = mesh.LocalDevices()
    self._params = self._devices.replicate(params)
    self._apply = jax.jit(network)
    self._size = self._devices.batch_size(batch_size)

  def __call__(self, gather, count, kept, what, with_logits=True):
    """The `Statistics` of a set of images; their features are never in memory all at once.

    Args:
      gather: gather(indices) -> uint8 [n, H, W, C].
      count: how many images there are.
      kept: of how many, evenly spread, the features are kept.
      what: the images are, in words.
      with_logits: keep the logits, of all.
    """
    moments: dict[str, frechet.Moments] = {}
    features, logits = [], []
    keep = np.zeros(count, bool)
    keep[np.linspace(0, count - 1, min(kept, count)).astype(int)] = True
    pending: tuple | None = None

    def note(indices, outputs):
      outputs = jax.tree.map(lambda a: a[: len(indices)], jax.device_get(outputs))
      for name in ('pool', 'spatial'):
        values = getattr(outputs, name)
        if values is not None:
          batch = frechet.Moments.of(values)
          moments[name] = moments[name] + batch if name in moments else batch
      features.append(outputs.pool[keep[indices]])
      if with_logits:
        logits.append(outputs.logits)
      bar.update(len(indices))

    with terminal.progress(f'looking at {what}', 'image', count) as bar:
      for start in range(0, count, self._size):
        indices = np.arange(start, min(start + self._size, count))
        # The last batch is filled up, so that nothing compiles anew.
        images = gather(np.resize(indices, self._size))
        outputs = self._apply(self._params, self._devices.split(images))
        if pending:  # meanwhile the devices work
          note(*pending)
        pending = indices, outputs
      assert pending, 'there is at least one image'
      note(*pending)
    return Statistics(
      pool=moments['pool'],
      spatial=moments.get('spatial'),
      features=np.concatenate(features),
      logits=np.concatenate(logits) if with_logits else None,
    )


def compare(generated, reference, neighbours=3):
  """All figures that two `Statistics` admit, a dict: see `ops.frechet` and `ops.fidelity`.

  `fid` and `sfid` are Fréchet distances of pool and of spatial features; the Inception Score is of
  the generated images alone; `precision` and `recall` are by `neighbours` nearest neighbours.
  """
  figures = {'fid': frechet_distance(generated.pool, reference.pool)}
  if generated.spatial is not None and reference.spatial is not None:
    figures['sfid'] = frechet_distance(generated.spatial, reference.spatial)
  if generated.logits is not None:
    score, spread = sample_quality.inception_score(generated.logits)
    figures |= {'inception_score': score, 'inception_score_std': spread}
  if generated.features is not None and reference.features is not None:
    sizes = len(generated.features), len(reference.features)
    distance, spread = sample_quality.kernel_distance(
      generated.features, reference.features, subset_size=min(1000, *sizes)
    )
    precision, recall = sample_quality.precision_recall(
      reference.features, generated.features, neighbours
    )
    figures |= {'kid': distance, 'kid_std': spread, 'precision': precision, 'recall': recall}
  return figures


def frechet_distance(a, b):
  """Fréchet distance of two `frechet.Moments`."""
  return frechet.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def save(file, statistics):
  """Writes `Statistics` as an npz, whose mu, sigma, mu_s and sigma_s other tools read too."""
  arrays = {'count': statistics.pool.count}
  for suffix, moments in (('', statistics.pool), ('_s', statistics.spatial)):
    if moments is not None:
      arrays |= {f'mu{suffix}': moments.mean, f'sigma{suffix}': moments.covariance}
  arrays |= {
    name: getattr(statistics, name)
    for name in ('features', 'logits')
    if getattr(statistics, name) is not None
  }
  np.savez(file, **arrays)


def load(arrays):
  """`Statistics` from what `save` wrote, or from anything else with `mu` and `sigma`, such as
  ADM's reference batches: a mapping of arrays."""
  count = int(arrays['count']) if 'count' in arrays else 2

  def moments(suffix):
    if f'mu{suffix}' not in arrays:
      return None
    mean, covariance = (np.asarray(arrays[n + suffix], np.float64) for n in ('mu', 'sigma'))
    return frechet.Moments(count, mean, covariance * (count - 1))

  optional = {name: arrays[name] for name in ('features', 'logits') if name in arrays}
  return Statistics(moments(''), moments('_s'), **optional)
