"""Any combination of settings trains a step, or gets one line that says what to change."""

import dataclasses
import functools
import pathlib
import re
import sys
import typing

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from hypothesis import strategies as st

from farmer_jax import config as config_lib
from farmer_jax import errors, jobs, losses, main
from farmer_jax.nn import farmer
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import state as state_lib
from farmer_jax.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[2]
LEAVES = dict(config_lib.leaves())

# A model that is quick to trace and to compile.
TINY = {
  'data.image_size': 4,
  'data.num_classes': 3,
  'train.batch_size': 4,
  'train.steps': 3,
  'model.flow.blocks': 2,
  'model.flow.layers': 1,
  'model.flow.width': 8,
  'model.flow.head_dim': 4,
  'model.flow.mlp_ratio': 2.0,
  'model.prior.layers': 1,
  'model.prior.width': 8,
  'model.prior.head_dim': 4,
  'model.prior.mlp_ratio': 2.0,
  'model.prior.condition_copies': 2,
  'model.prior.components': 3,
  'model.prior.redundant_components': 4,
}

# What decides about a training step.
TRAINING = [
  path for path in LEAVES if path.startswith(('model.', 'noise.', 'train.', 'data.', 'seed'))
]

many = functools.partial(
  hypothesis.settings,
  derandomize=True,
  deadline=None,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)


def kinds(field):
  """The types of a setting."""
  return typing.get_args(field.type) or (field.type,)


def sensible(path):
  """Values of a setting that its declaration allows, sizes being small."""
  field = LEAVES[path]
  allowed, choices = kinds(field), field.metadata['choices']
  least, below = field.metadata['least'], field.metadata['below']
  if choices:
    return st.sampled_from(choices)
  options = [st.none()] if type(None) in allowed else []
  if bool in allowed:
    options.append(st.booleans())
  elif int in allowed:
    small = st.integers(1 if least is None else least, 12)
    # Sizes alone take memory; a seed or an interval may be anything.
    large = st.sampled_from([1000, 2**31 - 1])
    options.append(small if path.startswith(('model.', 'data.', 'train.batch')) else small | large)
  elif float in allowed:
    lowest, highest = 1e-30 if least is None else least, 9e5 if below is None else 0.999
    edges = [lowest, highest] + [v for v in (1e-30, 1e-3, 0.5, 1.0, 2.0) if v < highest]
    options.append(st.sampled_from(edges) | st.floats(lowest, min(highest, 10.0)))
  elif str in allowed:
    options.append(st.text('abc,. 1', max_size=5))
  return st.one_of(options)


def wild(path):
  """Anything that a file or a program might put in place of a setting."""
  return st.one_of(
    sensible(path),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=20),
    st.sampled_from([10**400, -(10**400), 2**31, 1e300, 5e-324, '', '\n', '../x', 'a' * 10**5]),
    st.recursive(st.none(), st.lists, max_leaves=20),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
  )


def changes(paths, values):
  """Some settings at drawn values: {path: value}."""
  return st.lists(st.sampled_from(paths), min_size=1, max_size=8, unique=True).flatmap(
    lambda chosen: st.fixed_dictionaries({path: values(path) for path in chosen})
  )


def nested(values):
  """{dotted path: value} as a nested dict."""
  tree: dict = {}
  for path, value in values.items():
    *sections, name = path.split('.')
    node = tree
    for section in sections:
      node = node.setdefault(section, {})
    node[name] = value
  return tree


def built(values):
  """The checked configuration, or None after a refusal, which must be one helpful line."""
  try:
    config = config_lib.from_config_dict(values)
    config_lib.check(config)
    return config
  except errors.ConfigError as error:
    assert_helpful(str(error))
    return None


def assert_helpful(message):
  """One line, not endless, that names a key and a way out."""
  assert len(message.splitlines()) == 1
  assert len(message) < 1500
  assert 'config.' in message or '--job' in message
  ways = r'must|\bset\b|take|needs|turn it off|multiple|divisible|Known there|marginal|has learned'
  assert re.search(ways + '|train one|name the trained run|--job', message), message


@many(max_examples=400)
@hypothesis.given(changes(list(LEAVES), wild))
def test_anything_is_built_or_refused_in_one_line(values):
  config = built(nested(values))
  if config is not None:
    assert config_lib.from_config_dict(config_lib.to_dict(config)) == config
    assert config_lib.from_config_dict(config_lib.to_config_dict(config)) == config


@many(max_examples=100)
@hypothesis.given(
  st.sampled_from(['', 'data', 'model.flow', 'nowhere']),
  st.text(max_size=30) | st.integers() | st.none() | st.just('x' * 10**5) | st.just('a\nb'),
  st.integers() | st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)
def test_unknown_keys_are_refused_in_one_line(section, name, value):
  hypothesis.assume(name not in {field.name for field in dataclasses.fields(config_lib.Config)})
  tree = {name: value}
  for part in reversed(section.split('.') if section else []):
    tree = {part: tree}
  with pytest.raises(errors.ConfigError) as caught:
    config_lib.from_config_dict(tree)
  assert_helpful(str(caught.value))
  assert 'is not a setting' in str(caught.value)


def numeric_kinds(field):
  """Whether a field takes ints, floats or both; neither where it takes certain numbers alone."""
  return set() if field.metadata['choices'] else {int, float} & set(kinds(field))


@pytest.mark.parametrize('path', [path for path in LEAVES if numeric_kinds(LEAVES[path])])
def test_numbers_out_of_range_are_refused(path):
  """Below the least, at what a value must stay below, and where float32 or int32 end."""
  field = LEAVES[path]
  numeric = numeric_kinds(field)
  least, below = field.metadata['least'], field.metadata['below']
  bad = [2**31 if int in numeric else 1e6, -1, 10**400]
  bad += [0] if least is None else [least - 1]
  bad += [below] if below is not None else []
  bad += [float('nan'), float('inf'), 1e-31] if float in numeric else [0.5, True]
  for value in bad:
    assert built(nested({path: value})) is None, value


def make_step(config):
  """The training step, and what it takes: of a batch of noise."""
  model = farmer.build(config)
  optimizer = optimizer_lib.create(config.train)
  noise_std = optimizer_lib.noise_std_schedule(config.noise, config.train.steps)
  loss = functools.partial(losses.nll_loss, model=model, config=config, noise_std=noise_std)
  init = functools.partial(farmer.init_params, model=model)
  initialize = state_lib.initializer(init, optimizer, config.train.ema_decay)
  size, data = config.train.batch_size, config.data
  rng = np.random.default_rng(0)
  shape = (size, data.image_size, data.image_size, data.channels)
  batch = {
    'image': jnp.asarray(rng.integers(256, size=shape), jnp.uint8),
    'label': jnp.asarray(rng.integers(data.num_classes or 1, size=size), jnp.int32),
  }
  step = step_lib.make_train_step(loss, optimizer, config.train)
  return (lambda key: initialize(key, {})), step, batch


def check_step(values, execute):
  """Refused in one line, or a step can be made: traced, and with `execute` run."""
  config = built(nested(TINY | values))
  if config is None:
    return False
  with jax.enable_x64(config.model.dtype == 'float64'):
    initialize, step, batch = make_step(config)
    if not execute:
      state = jax.eval_shape(initialize, jax.random.key(config.seed))
      state, metrics = jax.eval_shape(step, state, batch)
      assert metrics['loss'].shape == ()
      return True
    state = jax.jit(initialize)(jax.random.key(config.seed))
    state, metrics = jax.jit(step)(state, batch)
    assert np.isfinite(metrics['loss'])
    assert np.isfinite(metrics['grad_norm'])
    leaves = jax.tree.leaves(jax.device_get(state.params))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
  return True


def check_combinations(count, execute, least):
  """Checks drawn combinations of the settings that decide about a training step; at least `least`
  of them must not have been refused."""
  done = []

  @many(max_examples=count)
  @hypothesis.given(changes(TRAINING, sensible))
  def check(values):
    done.append(check_step(values, execute))

  check()
  assert sum(done) >= least


def test_combinations_can_be_traced():
  check_combinations(20, False, least=5)


def test_combinations_train_a_step():
  check_combinations(4, True, least=1)


@pytest.mark.slow
def test_many_combinations_can_be_traced():
  check_combinations(400, False, least=100)


@pytest.mark.slow
def test_many_combinations_train_a_step():
  check_combinations(80, True, least=20)


# Values as they may be written on a command line.
WORDS = st.one_of(
  st.text(max_size=12),
  st.integers().map(str),
  st.floats().map(str),
  st.sampled_from(
    [
      'None',
      'True',
      '',
      ' ',
      '[1,2]',
      '(1,)',
      '{"a": 1}',
      '1e3',
      '1e999',
      '9' * 5000,
      '0x10',
      'é\n',
    ]
  ),
)


def command_line(arguments, patch, capsys):
  """Runs the program in this process, without its job; returns exit code, output, error, jobs."""
  calls = []
  patch.setattr(jobs, 'run', lambda *call: calls.append(call))
  patch.setattr(sys, 'argv', ['main', *arguments])
  patch.chdir(ROOT)
  flags.FLAGS.unparse_flags()
  for name in list(flags.FLAGS):
    if name.startswith('config.'):  # made by an earlier call's overrides
      delattr(flags.FLAGS, name)
    else:
      flags.FLAGS[name].unparse()
  try:
    main.run()
    code = 0
  except SystemExit as exit_:
    code = exit_.code or 0
  return code, *capsys.readouterr(), calls


@many(max_examples=150)
@hypothesis.given(
  st.sampled_from([*LEAVES, 'data', 'model.flow', 'train.lr', 'x', '', 'data.path.more', 'a b']),
  WORDS,
  st.sampled_from(['=', ' ', '']),
)
def test_command_lines_end_in_a_job_or_in_one_line(capsys, path, word, separator):
  argument = f'--config.{path}'
  arguments = [argument + separator + word] if separator != ' ' else [argument, word]
  with pytest.MonkeyPatch.context() as patch:
    code, out, err, calls = command_line(
      ['--config=configs/quickstart.py', *arguments], patch, capsys
    )
  assert not out
  if code:
    assert code == 1 and not calls
    assert err.startswith('error: ') and len(err.splitlines()) == 1, err
  else:
    assert len(calls) == 1 and not err
