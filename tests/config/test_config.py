"""Every key is documented, checked and used; mistakes get one clear line."""

import pathlib
import re

import pytest
from ml_collections import config_dict

from configs import (
  fashion_mnist,
  fashion_mnist_distill,
  fashion_mnist_samples,
  in64,
  in256,
  in256_distill,
  photos,
  quickstart,
)
from farmer_jax import config, errors

ROOT = pathlib.Path(__file__).parents[1]
ALL = {
  'quickstart': quickstart.get_config,
  'fashion_mnist': fashion_mnist.get_config,
  'fashion_mnist_samples': fashion_mnist_samples.get_config,
  'fashion_mnist_distill': fashion_mnist_distill.get_config,
  'photos': photos.get_config,
  'in64': in64.get_config,
  **{
    f'{name}-{v}': lambda get_config=get_config, v=v: get_config(v)
    for name, get_config in (
      ('in256', in256.get_config),
      ('in256_distill', in256_distill.get_config),
    )
    for v in ('1.1b-p16', '1.1b-p8', '1.9b-p16', '1.9b-p8')
  },
}


def test_defaults_survive_the_round_trip():
  assert config.from_config_dict(config.defaults()) == config.Config()


@pytest.mark.parametrize('name', ALL)
def test_shipped_configs_are_valid(name):
  values = ALL[name]()
  if values.job == 'distill':
    values.teacher = 'RUN'  # which run that is, only its user knows
  built = config.from_config_dict(values)
  config.check(built)
  assert built.name == name
  assert config.from_config_dict(config.to_dict(built)) == built


def test_every_key_is_read_by_the_code():
  code = '\n'.join(
    p.read_text() for p in (ROOT / 'farmer_jax').rglob('*.py') if p.name != 'config.py'
  )
  unread = [
    path for path, _ in config.leaves() if not re.search(rf'\.{path.rpartition(".")[2]}\b', code)
  ]
  assert not unread


def test_help_lists_every_key_with_its_meaning():
  text = config.describe()
  for path, field in config.leaves():
    assert f'--config.{path}=' in text
    assert field.metadata['doc'] in text


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'train': {'lr': 1}}, 'config.train.lr is not a setting.*train.steps'),
    ({'model': {'flow': {'block': 1}}}, 'Did you mean model.flow.blocks'),
    ({'train': {'steps': 1.5}}, 'train.steps must be int, not 1.5'),
    ({'train': {'steps': True}}, 'train.steps must be int'),
    ({'train': {'steps': None}}, 'train.steps must be int, not None'),
    ({'data': {'channels': 2}}, 'data.channels must be one of 1, 3'),
    ({'noise': {'kind': 'gauss'}}, 'uniform, gaussian'),
    ({'train': 3}, 'train is a section'),
  ],
)
def test_unknown_keys_and_values_are_refused(values, message):
  with pytest.raises(errors.ConfigError, match=message) as caught:
    config.from_config_dict(values)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('data.image_size', 9, 'not divisible by config.model.patch_size=2'),
    ('model.prior.informative_channels', 4, 'must be below 4, the channels of a token'),
    ('model.prior.informative_channels', -1, 'must not be below 0'),
    ('model.flow.width', 100, 'flow.width=100 is not a multiple'),
    ('model.prior.head_dim', 50, 'prior.width=.* is not a multiple'),
    ('train.batch_size', 0, 'must be above 0'),
    ('train.accumulate', 7, 'not divisible by config.train.accumulate=7'),
    ('train.steps', -1, 'must be above 0'),
    ('model.label_dropout', 1.0, 'below 1'),
    ('noise.std_end', -0.1, 'must not be below 0'),
    ('model.patch_size', 8, 'one patch'),
    ('profile.steps', '5', 'two numbers'),
    ('profile.steps', '7,5', 'two numbers'),
    ('train.optimizer.learning_rate', float('nan'), 'finite'),
    ('train.optimizer.learning_rate', float('inf'), 'finite'),
  ],
)
def test_contradictory_settings_are_refused(path, value, message):
  values = config.defaults()
  parent, _, name = path.rpartition('.')
  node = values
  for part in parent.split('.'):
    node = node[part]
  node[name] = value
  with pytest.raises(errors.ConfigError, match=message) as caught:
    config.check(config.from_config_dict(values))
  assert '\n' not in str(caught.value)


def test_optional_keys_can_be_overridden():
  values = config.defaults()
  with values.unlocked():
    values.update({'data': {'path': 'somewhere'}})
  assert config.from_config_dict(values).data.path == 'somewhere'
  with pytest.raises(TypeError):
    values.data.path = 3
  assert isinstance(values, config_dict.ConfigDict)


@pytest.mark.parametrize(
  'variant, expected',
  [
    ('1.1b-p16', (1.0, 0.9, 5, 5, 0.2, 0.9, 1.1, 2.5)),
    ('1.1b-p8', (1.0, 1.0, 5, 5, 0.2, 0.9, 1.1, 2.0)),
    ('1.9b-p16', (1.0, 0.9, 5, 5, 0.2, 0.9, 1.1, 3.5)),
    ('1.9b-p8', (1.0, 1.0, 5, 5, 0.1, 1.0, 1.1, 1.5)),
  ],
)
def test_published_guidance(variant, expected):
  """The paper's table: T_π, T_σ, s_c, s_u, T_π,v, T_σ,v, T_s, w."""
  g = config.from_config_dict(in256.get_config(variant)).sampling.guidance
  found = (
    g.proposal_logits,
    g.proposal_scales,
    g.conditional_candidates,
    g.unconditional_candidates,
    g.weighing_logits,
    g.weighing_scales,
    g.sharpening,
    g.scale,
  )
  assert found == expected and g.method == 'resample'
