# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tour
#
# This notebook trains a model of handwritten digits, and then uses what distinguishes it from other
# generative models: the exact density of an image. It takes about four minutes on two CPU cores.

# %%
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn import metrics

folders = [pathlib.Path.cwd(), *pathlib.Path.cwd().parents]
root = next(folder for folder in folders if (folder / 'farmer_jax').is_dir())
os.chdir(root)
sys.path.insert(0, str(root))

import farmer_jax
from farmer_jax.data import sources


def show(rows, names=(), titles=(), scale=0.55):
  """Shows images [rows, columns, H, W, 1], with names of rows and titles of columns."""
  rows = np.asarray(rows)[..., 0]
  height, width = rows.shape[:2]
  figsize = (width * scale + 1.2 * bool(names), height * scale + 0.3 * bool(titles))
  _, axes = plt.subplots(height, width, figsize=figsize, squeeze=False)
  for (row, column), axis in np.ndenumerate(axes):
    axis.imshow(rows[row, column], cmap='gray', vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    if titles and row == 0:
      axis.set_title(titles[column], fontsize=9)
    if names and column == 0:
      axis.set_ylabel(names[row], fontsize=9, rotation=0, ha='right', va='center')
  plt.tight_layout(pad=0.3)
  plt.show()


# %% [markdown]
# ## Train
#
# The configuration of the quickstart, with 500 instead of 800 steps, which take about two minutes.
# The job is the command line. A second start of the notebook finds the finished run in `runs/tour`.

# %%
steps = int(os.environ.get('TOUR_STEPS', 500))
settings = [f'--config.train.steps={steps}', '--config.train.sample_every=0']
command = [sys.executable, '-m', 'farmer_jax.main', '--config=configs/quickstart.py']
training = subprocess.run(
  [*command, '--workdir=runs/tour', *settings], check=True, capture_output=True, text=True
)
print(training.stdout.splitlines()[-1])

# %%
run = farmer_jax.load('runs/tour')
parameters = sum(a.size for a in jax.tree.leaves(run.params))
print(f'{parameters / 1e6:.2f} million parameters, step {run.step}')

# %% [markdown]
# ## Samples
#
# Image i depends only on the seed, its label, and i.

# %%
digits = np.arange(10)
samples = run.sample(np.repeat(digits, 10), seed=1).reshape(10, 10, 8, 8, 1)
show(samples, names=list(map(str, digits)))

# %% [markdown]
# ## Likelihoods
#
# `log_prob` computes the log-density of each image: in nats, and in bits per dimension, which bound
# the length of a lossless code. An image of 8×8 pixels with 256 gray levels has 8 bits per
# dimension without compression. Four draws of the dequantization noise reduce the noise of the
# scores.

# %%
source = sources.load(run.config.data, 'valid')
held_out = source.gather(range(len(source)))
images, labels = held_out['image'], held_out['label']
scores = run.log_prob(images, labels, num_draws=4)
bits = scores.bits_per_dim
print(f'{len(bits)} held-out images: mean {bits.mean():.2f} bits/dim')
print(f'from {bits.min():.2f} to {bits.max():.2f} bits/dim')

order = np.argsort(bits)
extremes = np.stack([images[order[:10]], images[order[::-1][:10]]])
show(extremes, names=['most\nlikely', 'least\nlikely'])

# %% [markdown]
# The most likely digits are ones: much of the image is black, and ones are alike. A high density
# does not mean that an image is typical.
#
# ## Classification
#
# Bayes' rule turns densities given each class into probabilities of the classes. The model has not
# been trained as a classifier.

# %%
by_class = [run.log_prob(images, np.full(len(images), c), num_draws=4).nats for c in digits]
by_class = np.stack(by_class, axis=1)  # [images, classes]
probabilities = np.asarray(jax.nn.softmax(by_class, axis=1))
predicted = probabilities.argmax(1)
print(f'accuracy: {(predicted == labels).mean():.3f}')

# %% [markdown]
# The digits whose label is not the class of the highest probability are ambiguous, or the label is
# wrong. The titles give both.

# %%
wrong = np.flatnonzero(predicted != labels)[:10]
titles = [f'{labels[i]} → {predicted[i]}' for i in wrong]
show(images[wrong][None], titles=titles, scale=0.8)

# %% [markdown]
# ## Odd ones
#
# Which images are not digits? The density without a class is compared for held-out digits and four
# changed copies of them. AUROC is the probability that a digit has a higher density than a changed
# image: 0.5 is chance, 1 is perfect.

# %%
random = np.random.default_rng(0)
patches = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
patches = random.permuted(patches, axis=1)
shuffled = patches.reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(images.shape)
sets = {
  'digits': images,
  'mirrored': images[:, :, ::-1],
  'upside down': images[:, ::-1],
  'shuffled\npatches': shuffled,
  'inverted': 255 - images,
}
densities = {name: run.log_prob(changed, num_draws=4).nats for name, changed in sets.items()}
show([changed[:10] for changed in sets.values()], names=list(sets))

figure, axis = plt.subplots(figsize=(6, 2.8))
for name, nats in densities.items():
  text = name.replace('\n', ' ')
  if name != 'digits':
    truth = np.repeat([1, 0], len(images))
    auroc = metrics.roc_auc_score(truth, np.concatenate([densities['digits'], nats]))
    text = f'{text}, AUROC {auroc:.2f}'
  axis.hist(nats, bins=np.linspace(-200, 220, 85), alpha=0.6, label=text)
axis.set(xlabel='log p(x), nats', ylabel='images', yticks=[])
axis.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## Through the flow
#
# The flow maps an image to latents, block by block. Each block changes every token by a shift and a
# scale that depend on the tokens before it, so it can be undone exactly. The rows show one digit of
# the data between the blocks, from the latents back to the image.

# %%
chosen = np.array([np.flatnonzero(labels == c)[0] for c in digits])
condition = jnp.asarray(labels[chosen])
latents = run.encode(images[chosen], labels[chosen])
print(
  'largest difference after encode and decode:',
  np.abs(run.decode(latents, labels[chosen]).astype(int) - images[chosen]).max(),
  'gray levels',
)

invert = jax.jit(
  lambda z, block: run.model.apply(
    {'params': run.params}, z, condition, block, method='invert_block'
  )[0]
)
tokens, columns, titles = run.model.final_flow_output(jnp.asarray(latents)), [], []
for block in range(run.config.model.flow.blocks, -1, -1):
  values = run.model.tokens_to_images(run.model.flow_output_in_order(tokens, block))
  columns.append(np.clip((values + 1) * 127.5, 0, 255))
  titles.append(f'after\nblock {block}' if block else 'image')
  if block:
    tokens = invert(tokens, block - 1)
show(np.stack(columns), names=titles)

# %% [markdown]
# The differences to the image, eight times as large. Gray means no change.

# %%
differences = np.stack([127.5 + 8 * (column - columns[-1]) for column in columns[:-1]])
show(np.clip(differences, 0, 255), names=titles[:-1])
print(f'log|det| per dimension: {scores.log_det.mean() / images[0].size:.3f} nats')

# %% [markdown]
# In this small model the flow changes the image little. The autoregressive prior, which reads the
# latents token by token, does most of the work.
#
# ## Guidance
#
# Guidance with scale w draws from a density proportional to p(x | c)^(1 + w) p(x)^(−w). All rows
# use the same random numbers. With a larger scale, the model recognizes more of its samples, and
# the samples of a class are more alike. If the scale is too large, some digits lose their shape.

# %%
scales = [0, 0.5, 1, 2, 4]
rows = []
for scale in scales:
  rows.append(run.sample(np.repeat(digits, 10), seed=2, guidance=scale))
  given = [run.log_prob(rows[-1], np.full(len(rows[-1]), c)).nats for c in digits]
  right = np.argmax(given, axis=0) == np.repeat(digits, 10)
  spread = rows[-1].reshape(10, 10, -1).std(1).mean()
  print(
    f'w = {scale:3}: {right.mean():.3f} recognized, standard deviation within classes {spread:.0f}'
  )
show([row[::10] for row in rows], names=[f'w = {scale}' for scale in scales])

# %% [markdown]
# ## Complete an image
#
# The lower three rows of a digit are hidden. Gibbs sampling draws one hidden pixel after the other
# from its distribution given all other pixels. Digits have 17 gray levels, so this distribution
# consists of 17 densities: the density of the image with each level. The model need not be trained
# for this. No class is given. The density is computed at the center of the gray levels.

# %%
levels = jnp.asarray(np.unique(images))
hidden = jnp.asarray([(row, column) for row in range(5, 8) for column in range(8)])


def log_density(images):
  values = (images + 0.5) / 128 - 1
  no_class = jnp.full(len(images), run.config.data.num_classes)
  return run.model.apply({'params': run.params}, values, no_class).total


@jax.jit
def sweep(images, key):
  """Draws all hidden pixels of the images [B, 8, 8, 1] once."""

  def draw(images, inputs):
    key, (row, column) = inputs
    candidates = jnp.repeat(images[:, None], len(levels), axis=1)
    candidates = candidates.at[:, :, row, column, 0].set(levels)
    logits = log_density(candidates.reshape(-1, 8, 8, 1)).reshape(len(images), -1)
    level = levels[jax.random.categorical(key, logits)]
    return images.at[:, row, column, 0].set(level), None

  return jax.lax.scan(draw, images, (jax.random.split(key, len(hidden)), hidden))[0]


known = images[chosen[[0, 2, 5]]]
masked = known.copy()
masked[:, 5:] = 0
chains = jnp.repeat(jnp.asarray(masked, jnp.float32), 6, axis=0)
for index in range(4):
  chains = sweep(chains, jax.random.key(index))
masked[:, 5:] = 90
drawn = np.asarray(chains).reshape(3, 6, 8, 8, 1)
rows = np.concatenate([known[:, None], masked[:, None], drawn], axis=1)
show(rows, titles=['image', 'known', *['drawn'] * 6], scale=0.8)

# %% [markdown]
# The strokes continue. Where the known part fits several digits, the model prefers the more likely
# one: the upper part of this two becomes a seven.
