"""Settings of sampling: labels and guidance. See tests/config/test_config.py for wrong values."""

import dataclasses

import numpy as np
import pytest

from farmer_jax import config, errors, sampling


def make_config(num_classes=10, **changes):
  data = config.Data(num_classes=num_classes)
  return config.Config(data=data, sampling=config.Sampling(**changes))


def test_grid_has_one_class_per_row():
  labels = sampling.grid_labels(make_config(grid_columns=3))
  np.testing.assert_array_equal(labels, np.repeat(np.arange(10)[:, None], 3, axis=1))
  assert sampling.grid_labels(make_config(grid_rows=4)).shape == (4, 8)
  unconditional = sampling.grid_labels(make_config(num_classes=0))
  assert unconditional.shape == (10, 8) and not unconditional.any()


@pytest.mark.parametrize(
  'text, num_classes, names, labels',
  [
    ('', 10, (), list(range(10))),
    ('3,3, 7,none', 10, (), [3, 3, 7, 10]),
    ('dog,0,cat', 2, ('cat', 'dog'), [1, 0, 0]),
    ('', 0, (), [0]),
    ('none', 0, (), [0]),
    ('none,some', 2, ('none', 'some'), [0, 1]),  # A class with this name.
  ],
)
def test_parse_labels(text, num_classes, names, labels):
  assert sampling.parse_labels(make_config(num_classes, labels=text), names) == labels


@pytest.mark.parametrize('word', ['10', '-1', 'bird', '1.5'])
def test_unknown_class_is_named(word):
  with pytest.raises(errors.ConfigError, match='config.sampling.labels') as caught:
    sampling.parse_labels(make_config(labels=f'3,{word}'), ('cat', 'dog'))
  assert word in str(caught.value) and 'cat, dog' in str(caught.value)


def test_no_class_needs_label_dropout():
  settings = make_config(labels='3,none')
  model = dataclasses.replace(settings.model, label_dropout=0.0)
  with pytest.raises(errors.ConfigError, match='label_dropout=0'):
    sampling.parse_labels(dataclasses.replace(settings, model=model))


def test_label_names():
  assert sampling.label_name(1, 2, ('cat', 'dog')) == 'dog'
  assert sampling.label_name(1, 2) == '1' and sampling.label_name(2, 2, ('cat', 'dog')) == ''


@pytest.mark.parametrize('label', [True, 1.0, 'True'])
def test_only_names_and_integers_are_labels(label):
  with pytest.raises(errors.DataError):
    sampling.class_label(label, 10)
  assert sampling.class_label(np.int64(1), 10) == 1


def test_guidance_scales():
  guidance = config.Guidance(scale=1.0)
  assert guidance.scales == (1, 1) and guidance.active
  changing = dataclasses.replace(guidance, final_scale=3.0)
  assert changing.scales == (1, 3)
  assert not dataclasses.replace(changing, method='none').active
  with pytest.raises(errors.ConfigError, match='config.data.num_classes=0'):
    config.check(make_config(num_classes=0, guidance=guidance))
