"""Each random combination of settings trains a step or is refused with one line."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from farmer_jax import config as config_lib
from farmer_jax import errors, losses
from farmer_jax.nn import farmer
from farmer_jax.training import optimizer as optimizer_lib
from farmer_jax.training import step as step_lib
from tests.support import command_line, models
from tests.support.config_values import LEAVES, nested
from tests.support.fuzzing import settings

pytestmark = pytest.mark.faults

# A model that compiles quickly.
TINY = config_lib.Config(
  data=config_lib.Data(image_size=4, num_classes=3),
  train=config_lib.Train(batch_size=4, steps=3),
  model=models.model_config(dtype='float32', prior_changes={'informative_channels': 0}),
)

# Keys that affect the training step.
TRAINING_KEYS = [
  path for path in LEAVES if path.startswith(('model.', 'noise.', 'train.', 'data.', 'seed'))
]


def allowed_values(path):
  """Returns a strategy for the values that a key allows. Sizes are small, to limit memory."""
  key = LEAVES[path]
  if key.choices:
    return st.sampled_from(key.choices)
  options = [st.none()] if type(None) in key.types else []
  if bool in key.types:
    options.append(st.booleans())
  elif int in key.types:
    small = st.integers(max(key.range.at_least, key.range.above + 1), 12)
    is_size = path.startswith(('model.', 'data.', 'train.batch'))
    options.append(small if is_size else small | st.sampled_from([1000, 2**31 - 1]))
  elif float in key.types:
    lowest = max(key.range.at_least, key.range.above + 1e-30)
    highest = min(key.range.at_most, key.range.below - 0.001, 9e5)
    edges = [lowest, highest, *(v for v in (1e-30, 1e-3, 0.5, 1.0, 2.0) if v < highest)]
    options.append(st.sampled_from(edges) | st.floats(lowest, min(highest, 10.0)))
  elif str in key.types:
    options.append(st.text('abc,. 1', max_size=5))
  return st.one_of(options)


def any_values(path):
  return st.one_of(
    allowed_values(path),
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
  """Returns a strategy for {path: value} with up to eight of the paths."""
  return st.lists(st.sampled_from(paths), min_size=1, max_size=8, unique=True).flatmap(
    lambda chosen: st.fixed_dictionaries({path: values(path) for path in chosen})
  )


def build(values):
  """Returns the checked configuration, or None if it is refused."""
  try:
    config = config_lib.from_config_dict(values)
    config_lib.check(config)
    return config
  except errors.ConfigError as error:
    assert_readable(error)
    return None


def assert_readable(error):
  """Asserts that the message is one short line that names a key or a flag."""
  message = str(error)
  assert len(message.splitlines()) == 1 and len(message) < 1500
  assert 'config.' in message or '--job' in message


@settings(max_examples=400)
@hypothesis.given(changes(list(LEAVES), any_values))
def test_any_values_are_accepted_or_refused(values):
  config = build(nested(values))
  if config is not None:
    assert config_lib.from_config_dict(config_lib.to_dict(config)) == config
    assert config_lib.from_config_dict(config_lib.to_config_dict(config)) == config


@settings(max_examples=100)
@hypothesis.given(
  st.sampled_from(['', 'data', 'model.flow', 'nowhere']),
  st.text(max_size=30) | st.integers() | st.none() | st.just('x' * 10**5) | st.just('a\nb'),
  st.integers() | st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)
def test_unknown_keys_are_refused(section, name, value):
  hypothesis.assume(name not in {field.name for field in dataclasses.fields(config_lib.Config)})
  tree = nested({section: {name: value}}) if section else {name: value}
  with pytest.raises(errors.ConfigError) as caught:
    config_lib.from_config_dict(tree)
  assert_readable(caught.value)


def check_step(config, execute):
  """Traces a training step on random images, and runs it if `execute`."""
  model, optimizer = farmer.build(config), optimizer_lib.create(config)
  loss = functools.partial(losses.nll_loss, model=model, config=config)
  init_params = functools.partial(farmer.init_params, model=model)
  initialize = step_lib.initializer(init_params, optimizer, config.train.ema_decay)
  step = step_lib.make_train_step(loss, optimizer, config.train)
  size, data, rng = config.train.batch_size, config.data, np.random.default_rng(0)
  image = rng.integers(256, size=(size, data.image_size, data.image_size, data.channels))
  label = rng.integers(data.num_classes or 1, size=size)
  batch = {'image': jnp.asarray(image, jnp.uint8), 'label': jnp.asarray(label, jnp.int32)}
  key = jax.random.key(config.seed)
  if not execute:
    _, metrics = jax.eval_shape(step, jax.eval_shape(initialize, key), batch)
    assert metrics['loss'].shape == ()
    return
  state, metrics = jax.jit(step)(jax.jit(initialize)(key), batch)
  finite = metrics['loss'], metrics['grad_norm'], jax.device_get(state.params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(finite))


@pytest.mark.parametrize(
  ('examples', 'execute', 'min_accepted'),
  [
    (20, False, 5),
    (4, True, 1),
    pytest.param(400, False, 100, marks=pytest.mark.slow),
    pytest.param(80, True, 20, marks=pytest.mark.slow),
  ],
)
def test_accepted_settings_train_a_step(examples, execute, min_accepted):
  accepted = 0

  @settings(max_examples=examples)
  @hypothesis.given(changes(TRAINING_KEYS, allowed_values))
  def check(values):
    nonlocal accepted
    config = build(nested(values, TINY))
    if config is not None:
      accepted += 1
      with jax.enable_x64(config.model.dtype == 'float64'):
        check_step(config, execute)

  check()
  assert accepted >= min_accepted


@settings(max_examples=150)
@hypothesis.given(
  st.sampled_from([*LEAVES, 'data', 'model.flow', 'train.lr', 'x', '', 'data.path.more', 'a b']),
  st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(['None', 'True', '', ' ', '[1,2]', '(1,)', '{"a": 1}', '1e3', '1e999']),
    st.sampled_from(['9' * 5000, '0x10', 'é\n']),
  ),
  st.sampled_from(['=', ' ', '']),
)
def test_overrides_run_the_job_or_are_refused(capsys, path, word, separator):
  override = [f'--config.{path}{separator}{word}']
  if separator == ' ':
    override = [f'--config.{path}', word]
  with pytest.MonkeyPatch.context() as monkeypatch:
    outcome = command_line.run(['--config=configs/quickstart.py', *override], monkeypatch, capsys)
  if outcome.code:
    command_line.assert_user_error(outcome)
  else:
    assert len(outcome.jobs) == 1 and not outcome.out and not outcome.err
