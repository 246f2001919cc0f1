"""Named random keys."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from farmer_jax.ops import random


def data(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_keys_differ_by_seed_name_and_index():
  # The CRC of 'noise' is above 2^31, the CRC of 'label_dropout' is not.
  names = ['noise', 'flip', 'label_dropout', 'label dropout', '']
  indices = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**31 - 1,)]
  keys = {
    data(random.named_key(seed, name, *index))
    for seed, name, index in itertools.product([0, 1, 2**31], names, indices)
  }
  assert len(keys) == 3 * len(names) * len(indices)


@pytest.mark.parametrize('index', [0, 7, 2**31 - 1])
def test_traced_index_gives_the_same_key(index):
  traced = jax.jit(lambda i: random.named_key(3, 'noise', i, 2))(jnp.int32(index))
  assert data(traced) == data(random.named_key(3, 'noise', index, 2))


def test_draws_of_different_keys_are_uncorrelated():
  keys = [random.named_key(0, name, i) for name in ('noise', 'flip') for i in range(4)]
  draws = np.stack([jax.random.normal(key, (4096,)) for key in keys])
  correlations = np.corrcoef(draws) - np.eye(len(keys))
  assert abs(correlations).max() < 5 / 4096**0.5


def test_categorical_follows_the_softmax():
  logits = jnp.asarray([[0.0, 1.0, -jnp.inf, 3.0, -60.0], [1e3, 1e3 - 1, 0.0, 0.0, 0.0]])
  draws = np.asarray(random.categorical(jax.random.key(0), logits, (100_000,)))
  assert draws.shape == (2, 100_000)
  for row, drawn in zip(special.softmax(np.asarray(logits, float), axis=-1), draws, strict=True):
    counts = np.bincount(drawn, minlength=5)
    possible = row > 1e-12
    assert (counts[~possible] == 0).all()
    expected = row[possible] / row[possible].sum() * counts.sum()
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3
  assert random.categorical(jax.random.key(0), logits[0]).shape == ()


def test_categorical_index_is_in_range(monkeypatch):
  """Also for a uniform number that rounds up to 1."""
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape, dtype: jnp.ones(shape, dtype))
  assert random.categorical(jax.random.key(0), jnp.zeros(7)) == 6
