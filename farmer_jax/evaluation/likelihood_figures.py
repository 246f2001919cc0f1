"""Pictures of the likelihoods of a set of images."""

import io

import numpy as np
import PIL.Image

from farmer_jax.evaluation import figures

_EXTREMES = 2, 8  # rows and columns of the images of highest, and of lowest likelihood
_CLASSES = 20  # shown in one picture


def draw(rows, source, class_names, unit):
  """Pictures uint8 [H, W, 3], by name: `classes`, `extremes` and `tokens`.

  Args:
    rows: see `summary.summarise`.
    source: the images, a sequence indexed by the rows' `index`.
    class_names: of the labels, or empty.
    unit: of the values.
  """
  values = np.asarray(rows.get('bits_per_dim', rows['loss']), np.float64)
  return {
    'classes': _classes(values, rows['label'], class_names, unit),
    'extremes': _extremes(values, rows['index'], source, unit),
    'tokens': _tokens(rows['tokens']),
  }


def separation(found, names):
  """Histograms of what `summary.separation` returns, of the data sets `names`, one over the other;
  uint8 [H, W, 3]."""

  def plot(pyplot):
    figure, axes = pyplot.subplots(1, len(found), figsize=(11, 3.6), layout='constrained')
    labels = {
      'log_density': 'log₂ p(x), bits an image',
      'complexity_corrected': 'log₂ p(x) + length as a PNG, bits an image',
    }
    for panel, (name, (auroc, *scores)) in zip(axes, found.items(), strict=True):
      together = np.concatenate(scores)
      # A few far away would hide the rest.
      low, high = _quantiles(together, 0.005)
      for values, label in zip(scores, names, strict=True):
        clipped, edges = np.clip(values, low, high), np.linspace(low, high, 80)
        panel.hist(clipped, edges, density=True, alpha=0.6, label=label)
      panel.set(title=f'AUROC {auroc:.3f}', xlabel=labels[name], yticks=[])
      panel.legend()
    return figure

  return _picture(plot)


def _classes(values, labels, class_names, unit):
  """A histogram a class, one below the other, the likeliest class on top."""
  groups = {'all': values}
  if class_names:
    means = {c: np.nanmean(values[labels == c]) for c in np.unique(labels)}
    order = sorted(means, key=lambda c: means[c])
    if len(order) > _CLASSES:
      order = order[: _CLASSES // 2] + order[-_CLASSES // 2 :]
    groups |= {class_names[c]: values[labels == c] for c in order}
  low, high = _quantiles(values, 0.001)
  edges = np.linspace(low, high, 60)

  def plot(pyplot):
    size = 6.5, 0.9 + 0.5 * len(groups)
    figure, axes = pyplot.subplots(
      len(groups), 1, figsize=size, sharex=True, squeeze=False, layout='constrained'
    )
    for panel, (name, group) in zip(axes[:, 0], groups.items(), strict=True):
      panel.hist(group, edges, color='C0' if name == 'all' else 'C1')
      panel.axvline(np.nanmean(group), color='black', linewidth=1)
      panel.set_ylabel(name, rotation=0, ha='right', va='center')
      panel.set_yticks([])
      panel.spines[['top', 'right', 'left']].set_visible(False)
    axes[-1, 0].set_xlabel(f'{unit}; the line is the mean')
    return figure

  return _picture(plot)


def _extremes(values, indices, source, unit):
  """The images of highest and lowest likelihood."""
  rows, columns = _EXTREMES
  # What is not finite comes last.
  order = np.argsort(values, kind='stable')
  columns = max(1, min(columns, len(order) // (2 * rows)))
  shown = rows * columns
  if len(order) < 2 * shown:
    rows, shown = 1, min(columns, len(order))
  ends = {'highest': order[:shown], 'lowest': order[::-1][:shown]}
  picked = np.concatenate(list(ends.values()))
  images = source.gather(indices[picked])['image']
  names = []
  for name, chosen in ends.items():
    low, high = np.sort(values[chosen])[[0, -1]]
    names += [f'{name} likelihood', f'{low:.2f} to {high:.2f} {unit}'][:rows]
  return figures.sample_grid(images.reshape(2 * rows, -1, *images.shape[1:]), names)


def _tokens(tokens):  # [n, N], nats
  """The mean negative log-likelihood of each token: over the image, and along the sequence."""
  mean = np.nanmean(tokens, axis=0)
  low, high = np.nanquantile(tokens, (0.1, 0.9), axis=0)
  side = int(len(mean) ** 0.5)

  def plot(pyplot):
    figure, (left, right) = pyplot.subplots(
      1, 2, figsize=(11, 4), width_ratios=(1, 1.8), layout='constrained'
    )
    shown = left.imshow(mean.reshape(side, side), cmap='viridis')
    figure.colorbar(shown, ax=left, label='informative channels, nats a token')
    left.set(title='mean over the images', xticks=[], yticks=[])
    position = np.arange(1, len(mean) + 1)
    right.fill_between(position, low, high, alpha=0.3, label='middle 80 % of the images')
    right.plot(position, mean, label='mean')
    right.set(xlabel='token, in raster order', ylabel='negative log-likelihood, nats')
    right.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return figure

  return _picture(plot)


def _quantiles(values, share):
  """What `share` of the finite values is below, and above."""
  finite = values[np.isfinite(values)]
  return np.quantile(finite, (share, 1 - share)) if len(finite) else (0.0, 1.0)


def _picture(plot):
  """What `plot(pyplot)` draws, uint8 [H, W, 3]."""
  import matplotlib  # Late: it takes a second to load.

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, stream = plot(pyplot), io.BytesIO()
  figure.savefig(stream, format='png', dpi=100)
  pyplot.close(figure)
  return np.asarray(PIL.Image.open(stream).convert('RGB'))
