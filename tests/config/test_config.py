"""Configuration: every key is documented, checked and used. Errors name the key."""

import dataclasses
import importlib
import math
import pathlib
import re

import pytest

from configs import in256
from farmer_jax import config, errors
from farmer_jax.config import renames
from tests.support.config_values import LEAVES, NUMBERS, nested, parse, set_path

ROOT = pathlib.Path(__file__).parents[2]
PAPER_VARIANTS = ('1.1b-p16', '1.1b-p8', '1.9b-p16', '1.9b-p8')
VARIANTS = {
  'in256': PAPER_VARIANTS,
  'in256_distill': PAPER_VARIANTS,
  'photo_crops': ('32-p4', '64-p8'),
  'emoji': ('32-p8', '32-p4', '64-p8', '64-p4-gpu'),
}
CONFIGS = [
  (file.stem, *variant)
  for file in sorted((ROOT / 'configs').glob('*.py'))
  if file.stem not in ('__init__', 'from_run')
  for variant in (zip(VARIANTS[file.stem]) if file.stem in VARIANTS else [()])
]


def refusal(values):
  """Returns the message of the `ConfigError` for a nested dict or a ConfigDict."""
  with pytest.raises(errors.ConfigError) as caught:
    config.check(config.from_config_dict(values))
  message = str(caught.value)
  assert len(message.splitlines()) == 1
  return message


def test_defaults_round_trip():
  assert config.from_config_dict(config.defaults()) == config.Config()


@pytest.mark.parametrize('name', CONFIGS, ids='-'.join)
def test_shipped_configs_are_valid(name):
  module, *variant = name
  values = importlib.import_module(f'configs.{module}').get_config(*variant)
  if values.job == 'distill':
    values.teacher = 'RUN'  # Users name the teacher on the command line.
  built = config.from_config_dict(values)
  config.check(built)
  assert built.name == '-'.join(name)
  assert config.from_config_dict(config.to_dict(built)) == built


def test_every_key_is_used():
  files = (p for p in (ROOT / 'farmer_jax').rglob('*.py') if 'config' not in p.parts)
  code = '\n'.join(file.read_text() for file in files)
  unused = {path for path in LEAVES if not re.search(rf"[.']{path.rpartition('.')[2]}\b", code)}
  # Used by properties and methods of the configuration.
  ratios = {'model.flow.mlp_ratio', 'model.prior.mlp_ratio'}
  assert unused <= {'sampling.guidance.final_scale', 'model.prior.redundant_kind'} | ratios


def test_help_describes_every_key():
  text = config.describe()
  described = re.findall(r'^  --config\.([\w.]+)=.*\n(?:      \S.*\n)*      \S.*\.$', text, re.M)
  assert sorted(described) == sorted(LEAVES)
  assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(
  ('values', 'named'),
  [
    # Unknown keys and wrong types.
    ('train.lr=1', 'config.train.lr train.steps'),
    ('model.flow.block=1', 'model.flow.blocks?'),
    ('train.steps=1.5', 'config.train.steps int 1.5'),
    ('train.steps=True', 'config.train.steps int'),
    ('train.steps=None', 'config.train.steps int None'),
    ('data.channels=2', 'config.data.channels 1, 3'),
    ('noise.kind=gauss', 'config.noise.kind uniform, gaussian'),
    ('train=3', 'config.train'),
    # Contradictions.
    ('data.image_size=9', 'data.image_size=9 model.patch_size=2'),
    ('model.prior.informative_channels=4', 'model.prior.informative_channels=4'),
    ('model.flow.width=100', 'model.flow.width=100 model.flow.head_dim=64'),
    ('model.prior.head_dim=50', 'model.prior.width=128 model.prior.head_dim=50'),
    ('model.flow.mlp_ratio=0.001', 'model.flow.mlp_ratio=0.001'),
    ('model.patch_size=8', 'model.patch_size=8 model.flow.blocks=0'),
    ('model.patch_size=1 model.flow.kind=coupling', 'model.flow.kind model.patch_size=1'),
    ('model.flow.kind=jet', 'model.flow.kind autoregressive, coupling'),
    ('model.flow.blocks=0 model.prior.kind=normal', 'model.prior.kind model.flow.blocks=0'),
    ('noise.curriculum_fraction=1.5', 'noise.curriculum_fraction=1.5'),
    ('train.accumulation_steps=7', 'train.batch_size=64 train.accumulation_steps=7'),
    ('data.num_classes=0 model.flow.class_conditional=True', 'class_conditional num_classes=0'),
    ('init_from=A branch_from=B', 'config.init_from config.branch_from None'),
    ('init_parts=flow', "config.init_parts='flow' config.init_from"),
    ('job=distill teacher=X init_from=A', '--job=distill config.teacher config.init_from'),
    ('job=distill teacher=X branch_from=A', '--job=distill config.teacher config.branch_from'),
    ("train.extensions='9:8'", "config.train.extensions='9:8' 1000:1000:keep_final"),
    ("profile.steps='5'", "profile.steps='5'"),
    ("profile.steps='7,5'", "profile.steps='7,5'"),
    ('name=../x', 'config.name'),
    (
      'sampling.guidance.scale=1 model.prior.kind=normal',
      'model.prior.kind sampling.guidance.scale=0',
    ),
    (
      'sampling.guidance.final_scale=1 model.label_dropout=0',
      'model.label_dropout=0 sampling.guidance.scale=0',
    ),
    ('sampling.inverse=student', 'sampling.inverse=student --job=distill'),
    (
      'sampling.inverse=student teacher=X sampling.refinement_rounds=1 distill.objective=hidden',
      'sampling.refinement_rounds=1 distill.objective',
    ),
    ('sampling.denoise=True', 'sampling.denoise noise.kind=gaussian'),
    ('job=distill', '--config.teacher'),
    ('job=distill teacher=X model.flow.blocks=0', 'model.flow.blocks=0'),
    ('job=distill teacher=X model.flow.kind=coupling', '--job=distill model.flow.kind one pass'),
    (
      'sampling.inverse=student teacher=X model.flow.kind=coupling',
      'sampling.inverse model.flow.kind one pass',
    ),
    ('train.best_metric=fidelity', 'train.best_metric train.fidelity_every'),
    ('train.fidelity_every=1 data.num_classes=0', 'num_classes=0 config.fidelity.weights'),
    ('train.fidelity_every=1 fidelity.network=inception', 'fidelity.network fidelity.weights'),
    ('train.fidelity_every=1 model.label_dropout=0', 'label config.train.fidelity_scales=0'),
    ("train.fidelity_every=1 train.fidelity_scales='1,x'", "train.fidelity_scales='1,x'"),
    ("train.fidelity_every=1 train.fidelity_scales='-1'", "train.fidelity_scales='-1'"),
    ('train.fidelity_every=1 train.fidelity_count=10', 'train.fidelity_count=10'),
    ('train.fidelity_every=1 fidelity.pairwise_images=3', 'fidelity.pairwise_images=3'),
    (
      'sampling.inverse=student teacher=X sampling.refinement_rounds=1 distill.denoise=True',
      'sampling.refinement_rounds=1 distill.denoise=True',
    ),
    (
      'sampling.inverse=student teacher=X sampling.densities=True distill.denoise=True',
      'sampling.densities distill.denoise=True config.sampling.inverse=auto',
    ),
    ('job=distill teacher=X distill.width=100', 'distill.width=100 model.flow.head_dim=64'),
    ('job=distill teacher=X distill.denoise=True', 'distill.denoise noise.kind=gaussian'),
    (
      'job=distill teacher=X noise.kind=gaussian distill.denoise=True',
      'distill.denoise=True distill.all_tokens=True',
    ),
    (
      'job=distill teacher=X noise.kind=gaussian distill.denoise=True distill.all_tokens=True'
      ' distill.generated_fraction=0.5',
      'distill.denoise=True distill.generated_fraction=0',
    ),
    (
      'job=distill teacher=X distill.perceptual_weight=1 data.num_classes=0',
      'distill.perceptual_weight=1.0 data.num_classes=0',
    ),
    ('job=compile teacher=X', '--job=compile config.teacher'),
    ('job=likelihood likelihood.noise_std=0.1', 'likelihood.noise_std'),
    ('job=likelihood likelihood.condition=marginal data.num_classes=0', 'marginal num_classes=0'),
    ('job=likelihood likelihood.condition=none model.label_dropout=0', 'none label_dropout=0'),
    ('job=likelihood likelihood.ood_source=digits', 'likelihood.ood_source'),
    ('job=fidelity data.num_classes=0', 'fidelity.network=inception'),
    ('job=fidelity fidelity.network=inception', 'fidelity.weights'),
    ('job=fidelity fidelity.count=10', 'fidelity.count=10'),
  ],
)
def test_refused_values(values, named):
  message = refusal(parse(values))
  assert all(part in message for part in named.split())


@pytest.mark.parametrize('path', NUMBERS)
def test_numbers_out_of_range(path):
  """The numbers are outside the range of the key, or too large or small for int32 or float32."""
  allowed, is_float = LEAVES[path].range, float in LEAVES[path].types
  bad = [1e6 if is_float else 2**31, -1, 10**400, allowed.at_least - 1, allowed.above]
  bad += [allowed.at_most + 0.5, allowed.below]
  bad = [value for value in bad if math.isfinite(min(value, 10**300))]
  bad += [math.nan, math.inf, 1e-31] if is_float else [0.5, True]
  for value in bad:
    assert f'config.{path}' in refusal(nested({path: value}))


def test_figures_compute_densities_of_samples_with_noise():
  for values, expected in (
    ('sampling.inverse=student', False),
    ('sampling.figures=True', True),
    ('sampling.figures=True sampling.inverse=student', True),
    ('sampling.figures=True distill.denoise=True', True),
    ('sampling.figures=True sampling.inverse=student distill.denoise=True', False),
    ('sampling.densities=True', True),
  ):
    assert config.from_config_dict(parse(values)).computes_densities == expected, values


def test_coupling_flow_needs_one_token_of_two_channels():
  config.check(config.from_config_dict(parse('model.patch_size=8 model.flow.kind=coupling')))
  config.check(config.from_config_dict(parse('model.patch_size=2 model.flow.kind=coupling')))
  config.check(
    config.from_config_dict(parse('data.channels=3 model.patch_size=1 model.flow.kind=coupling'))
  )


def test_optional_keys_can_be_overridden():
  values = config.defaults()
  values.data.path = 'somewhere'
  assert config.from_config_dict(values).data.path == 'somewhere'
  with pytest.raises(TypeError):
    values.data.path = 3


def test_changeable_keys():
  changeable = {path for path, key in LEAVES.items() if key.changeable}
  for section in ('mesh', 'profile', 'sampling', 'sampling.guidance', 'likelihood', 'fidelity'):
    paths = {path for path in LEAVES if path.startswith(f'{section}.')}
    assert paths and paths <= changeable
  assert 'train.log_every' in changeable
  assert not {'train.steps', 'seed', 'model.flow.blocks', 'distill.objective'} & changeable


@pytest.mark.parametrize(('old', 'new'), renames.RENAMED_KEYS.items())
def test_old_names_are_read_but_not_accepted_as_overrides(old, new):
  """Saved configurations can have old names. ConfigDicts have new names."""
  assert new in LEAVES and old not in LEAVES
  value = LEAVES[new].choices[-1] if LEAVES[new].choices else LEAVES[new].default
  saved = nested({old: value})
  assert config.get(config.from_config_dict(saved), new) == value
  assert saved == nested({old: value})
  values = config.defaults()
  with values.unlocked():
    set_path(values, old, value)
  message = refusal(values)
  assert f'config.{old}' in message and f'config.{new}' in message


def test_old_values_are_read():
  built = config.from_config_dict(parse('distill.objective=stages'))
  assert built.distill.objective == 'outputs'


@pytest.mark.parametrize('values', [{'train': 3}, {'train': None}, {'sampling': {'guidance': []}}])
def test_upgrade_leaves_malformed_values(values):
  assert config.upgrade(values) == values


def test_derived_quantities():
  built = config.Config(
    data=config.Data(image_size=32, channels=3),
    model=config.Model(patch_size=4, prior=config.Prior(informative_channels=12)),
  )
  assert (built.num_tokens, built.token_channels) == (64, 48)
  prior = built.model.prior
  assert prior.num_informative_channels(48) == 12 and prior.has_redundant_mixture(48)
  assert config.Prior().num_informative_channels(48) == 48
  for changes in ({'informative_channels': 0}, {'redundant_kind': 'normal'}, {'kind': 'normal'}):
    assert not dataclasses.replace(prior, **changes).has_redundant_mixture(48)
  assert config.Train(ema_decay=0.9).evaluated_params == 'ema_params'
  assert config.Train().evaluated_params == 'params'


def test_guidance_scales():
  assert config.Guidance(scale=2.0).scales == (2.0, 2.0)
  assert config.Guidance(scale=2.0, final_scale=0.0).scales == (2.0, 0.0)
  assert config.Guidance(final_scale=1.0).active
  assert not config.Guidance().active
  assert not config.Guidance(method='none', scale=2.0).active
  assert config.Config().supports_guidance
  for change in ('data.num_classes=0', 'model.label_dropout=0', 'model.prior.kind=normal'):
    assert not config.from_config_dict(parse(change)).supports_guidance


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    ('', 'classifier'),
    ('data.image_size=64', 'classifier'),
    ('data.channels=3 data.image_size=16', 'classifier'),
    ('data.channels=3 data.image_size=32', 'inception'),
    ('fidelity.network=inception', 'inception'),
  ],
)
def test_feature_network(values, expected):
  assert config.from_config_dict(parse(values)).feature_network == expected


@pytest.mark.parametrize(
  ('variant', 'expected'),
  [
    ('1.1b-p16', (1.0, 0.9, 5, 5, 0.2, 0.9, 1.1, 2.5)),
    ('1.1b-p8', (1.0, 1.0, 5, 5, 0.2, 0.9, 1.1, 2.0)),
    ('1.9b-p16', (1.0, 0.9, 5, 5, 0.2, 0.9, 1.1, 3.5)),
    ('1.9b-p8', (1.0, 1.0, 5, 5, 0.1, 1.0, 1.1, 1.5)),
  ],
)
def test_published_guidance(variant, expected):
  """Table of the paper: T_π, T_σ, s_c, s_u, T_π,v, T_σ,v, T_s, w."""
  names = ('proposal_logit_factor', 'proposal_scale_factor', 'conditional_candidates')
  names += ('unconditional_candidates', 'weighing_logit_factor', 'weighing_scale_factor')
  guidance = config.from_config_dict(in256.get_config(variant)).sampling.guidance
  assert tuple(getattr(guidance, name) for name in (*names, 'sharpening', 'scale')) == expected
  assert guidance.method == 'resample'
