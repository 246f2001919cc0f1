"""Runs that start from the parameters or from the state of another run."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from scipy import ndimage

from farmer_jax import config as config_lib
from farmer_jax import errors
from farmer_jax.jobs import export, pretrain
from farmer_jax.nn import farmer
from farmer_jax.training import start as start_lib
from farmer_jax.workdir import layout
from tests.support import models, processes, runs

tiny = runs.training_config
STEPS = processes.STEPS


def model_config(num_classes=3, image_size=4, flow=None, prior=None, **model):
  """Returns the configuration of a tiny model in float64."""
  return config_lib.Config(
    data=config_lib.Data(image_size=image_size, num_classes=num_classes),
    model=models.model_config(dict(blocks=3) | (flow or {}), prior, **model),
  )


@functools.cache
def parameters(config, seed):
  """Returns random parameters of the model of a configuration, by path."""
  data = config.data
  images = jnp.zeros((1, data.image_size, data.image_size, data.channels))
  model = farmer.build(config)
  return traverse_util.flatten_dict(
    models.filled_parameters(model, images, jnp.zeros(1, int), seed=seed)
  )


def convert(old, new, old_names=(), new_names=(), parts=('flow', 'prior')):
  """Returns the first parameters of `new`, and their origins by module, and those of `old`."""
  init = functools.partial(farmer.init_boxed_params, model=farmer.build(old))
  shapes = jax.eval_shape(init, jax.random.key(0))
  source = start_lib.Source(old, old_names, shapes, lambda shapes: shapes, {})
  assert not start_lib._differences(new, source, parts)
  classes = start_lib._classes(new, source, new_names)
  start = start_lib.Start(new, source, None, parts, classes)
  found = start.convert(parameters(new, 1), parameters(old, 2))
  origins = {module: origin for module, _, origin in start.origins()}
  return {path: value for path, (value, _) in found.items()}, origins


def losses(config, params, label):
  """Returns log-densities of four images with this label."""
  size = config.data.image_size
  images = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (4, size, size, 1)))
  model, params = farmer.build(config), traverse_util.unflatten_dict(params)
  return model.apply({'params': params}, images, jnp.full(4, label)).total


@pytest.fixture
def double():
  """Double precision in one test. Jobs set the precision themselves."""
  with jax.enable_x64(True):
    yield


conversion = pytest.mark.usefixtures('double')


@conversion
@pytest.mark.parametrize('kind', ['autoregressive', 'coupling'])
def test_equal_model_takes_all_parameters(kind):
  config = model_config(flow=dict(kind=kind, class_conditional=True))
  found, origins = convert(config, config)
  expected = parameters(config, 2)
  assert found.keys() == expected.keys() and set(origins.values()) == {'taken'}
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@conversion
def test_classes_are_taken_by_name():
  """The density of a class follows its name. New classes start as "no class"."""
  old = model_config(3, flow=dict(class_conditional=True))
  new = model_config(4, flow=dict(class_conditional=True))
  found, origins = convert(old, new, ('ant', 'bee', 'cat'), ('cat', 'ant', 'dog', 'eel'))
  expected = parameters(old, 2)
  for label, same in ((0, 2), (1, 0), (2, 3), (3, 3), (4, 3)):
    np.testing.assert_allclose(
      losses(new, found, label), losses(old, expected, same), rtol=1e-12, err_msg=label
    )
  assert origins['prior classes'] == origins['flow classes']
  assert origins['flow classes'].startswith('2 of 3 classes and "no class" taken, 2 new: like')


@conversion
def test_classes_without_names_are_taken_by_index():
  old = model_config(2, label_dropout=0.0)
  new = model_config(3, label_dropout=0.0)
  found, origins = convert(old, new, ('ant', 'bee'))
  path = 'prior', 'class_embedding', 'embedding'
  a, b, _ = parameters(old, 2)[path]
  np.testing.assert_array_equal(found[path][:2], [a, b])
  # The source has not learned "no class", so that the new class is random.
  np.testing.assert_array_equal(found[path][2], parameters(new, 1)[path][2])
  assert origins['prior classes'].endswith('1 new: random')


@conversion
@pytest.mark.parametrize('kind', ['autoregressive', 'coupling'])
def test_model_without_classes_keeps_the_density_of_no_class(kind):
  old = model_config(3, flow=dict(kind=kind, class_conditional=True))
  new = model_config(0, flow=dict(kind=kind))
  found, origins = convert(old, new)
  expected = losses(old, parameters(old, 2), 3)
  np.testing.assert_allclose(losses(new, found, 0), expected, rtol=1e-12)
  assert not np.allclose(expected, losses(old, parameters(old, 2), 0))
  assert origins['prior classes'] == '0 of 3 classes and "no class" taken'


@conversion
def test_new_classes_have_the_density_of_a_model_without_classes():
  old, new = model_config(0), model_config(3, flow=dict(class_conditional=True))
  found, _ = convert(old, new)
  for label in range(4):
    expected = losses(old, parameters(old, 2), 0)
    np.testing.assert_allclose(losses(new, found, label), expected, rtol=1e-12)


@conversion
@pytest.mark.parametrize('sizes', [(4, 8), (8, 4), (6, 8)])
@pytest.mark.parametrize('kind', ['autoregressive', 'coupling'])
@pytest.mark.parametrize('redundant', ['mixture', 'normal'])
def test_positions_belong_to_places_in_the_image(kind, sizes, redundant):
  """Compares with an interpolation of the embedding of each patch, in the order of each block."""
  prior, flow = dict(redundant_kind=redundant), dict(kind=kind)
  old, new = (model_config(image_size=size, flow=flow, prior=prior) for size in sizes)
  found, origins = convert(old, new)
  side, new_side = (size // 2 for size in sizes)
  centers = (np.arange(new_side) + 0.5) * side / new_side - 0.5
  at = np.meshgrid(centers, centers, indexing='ij')

  def resized(embeddings, reverse):
    """Interpolates the embeddings of tokens, the last of which may be missing."""
    order = np.arange(side**2)[::-1] if reverse else np.arange(side**2)
    grid = np.full((side**2, embeddings.shape[-1]), np.nan)
    grid[order[: len(embeddings)]] = embeddings  # in raster order
    grid = grid.reshape(side, side, -1)
    if len(embeddings) < side**2:
      grid = grid[::-1, ::-1] if reverse else grid
      grid[-1, -1] = grid[-1, -2] + grid[-2, -1] - grid[-2, -2]
      grid = grid[::-1, ::-1] if reverse else grid
    channels = range(grid.shape[-1])
    places = [
      ndimage.map_coordinates(grid[..., c], at, order=1, mode='nearest').ravel() for c in channels
    ]
    result = np.stack(places, -1)
    return result[::-1] if reverse else result

  path = 'flow', 'stack', 'positions'
  for block, (before, after) in enumerate(zip(parameters(old, 2)[path], found[path], strict=True)):
    reverse = kind == 'autoregressive' and block % 2 == 1
    np.testing.assert_allclose(after, resized(before, reverse)[: len(after)], atol=1e-12)
  path, copies = ('prior', 'positions'), old.model.prior.condition_copies
  before, after = parameters(old, 2)[path], found[path]
  np.testing.assert_array_equal(after[:copies], before[:copies])
  tokens = before[copies:] if redundant == 'mixture' else before[copies:-1]
  reverse = kind == 'autoregressive'  # Three blocks reverse the order three times.
  np.testing.assert_allclose(after[copies:], resized(tokens, reverse), atol=1e-12)
  assert origins[
    'prior positions'
  ] == f'interpolated from {side}x{side} to {new_side}x{new_side}' + (' tokens')


@conversion
@pytest.mark.parametrize('part', ['flow', 'prior'])
def test_one_part_is_taken_and_the_other_can_have_another_size(part):
  other = 'prior' if part == 'flow' else 'flow'
  old, new = model_config(), model_config(**{other: dict(width=16)})
  found, origins = convert(old, new, parts=(part,))
  for path, value in found.items():
    expected = parameters(old, 2) if path[0] == part else parameters(new, 1)
    np.testing.assert_array_equal(value, expected[path])
  assert origins[part] == 'taken' and origins[other] == 'new'


@pytest.fixture(scope='module', name='source')
def _source(tmp_path_factory):
  """A trained run with all its checkpoints, which tests must not change."""
  workdir = tmp_path_factory.mktemp('source') / 'run'
  pretrain.run(tiny(keep_checkpoints=9), workdir)
  return workdir


def contents(folder):
  return {str(p): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def tuning(source, **train):
  return dataclasses.replace(tiny(**train), init_from=str(source), name='tuned')


def validations(workdir):
  return [r['loss'] for r in processes.records(workdir) if r['split'] == 'valid']


@pytest.fixture(scope='module', name='tuned')
def _tuned(source, tmp_path_factory):
  """A run that starts from the parameters of `source` and is never interrupted."""
  workdir = tmp_path_factory.mktemp('tuned') / 'run'
  before = contents(source)
  pretrain.run(tuning(source), workdir)
  assert contents(source) == before
  return workdir


def test_tuning_starts_at_the_loss_of_the_source(source, tuned):
  """The parameters are those of the EMA, from which validation of the source was computed."""
  np.testing.assert_allclose(validations(tuned)[0], validations(source)[-1], rtol=1e-6)
  assert [r['step'] for r in processes.records(tuned) if r['split'] == 'valid'] == [0, 4, 8]
  record = json.loads((tuned / 'init.json').read_text())
  assert record['source'] == str(source) and record['step'] == STEPS
  assert record['parameters'] == 'ema_params'
  assert {origin for _, _, origin in record['modules']} == {'taken'}
  rates = [r['learning_rate'] for r in processes.records(tuned) if r['split'] == 'train']
  assert rates[0] < rates[1]  # Its warm-up begins again.


def test_one_checkpoint_can_be_the_source(source, workdir):
  checkpoint = source / 'checkpoints' / '4'
  start = start_lib.open_start(tuning(checkpoint), workdir, ())
  assert start.source.checkpoint[1] == 4
  with pytest.raises(errors.CheckpointError, match='no checkpoint of step 5'):
    pretrain.run(tuning(source / 'checkpoints' / '5'), workdir)


def test_export_can_be_the_source(source, tuned, tmp_path):
  """The result equals that of a run that starts from the exported run."""
  folder, workdir = tmp_path / 'export', tmp_path / 'run'
  settings = dataclasses.replace(tiny().export, path=str(folder))
  export.run(dataclasses.replace(tiny(), job='export', export=settings), source)
  pretrain.run(tuning(folder), workdir)
  processes.assert_equal(tuned, workdir)
  assert json.loads((workdir / 'init.json').read_text())['step'] == STEPS
  with pytest.raises(errors.ConfigError, match='init_from'):
    start_lib.open_start(branch(folder), tmp_path / 'branch', ())
  with pytest.raises(errors.CheckpointError, match=f'step {STEPS} now, and was of step 4'):
    start_lib.open_source(folder, 4)


@pytest.mark.faults
def test_source_is_read_until_the_first_checkpoint(source, tuned, tmp_path):
  """The source has a newer checkpoint when the run starts again. Then it is missing."""
  moving, workdir = tmp_path / 'source', tmp_path / 'run'
  shutil.copytree(source, moving)
  config = tuning(moving)
  with runs.interrupted_after(batches=1):
    pretrain.run(config, workdir)
  shutil.copytree(source / 'checkpoints' / '6', moving / 'checkpoints' / '10')
  hidden = moving.rename(tmp_path / 'hidden')
  with pytest.raises(errors.WorkdirError, match=r'config\.init_from') as caught:
    pretrain.run(config, workdir)
  assert len(str(caught.value).splitlines()) == 1
  hidden.rename(moving)
  with runs.interrupted_after(batches=3):
    pretrain.run(config, workdir)
  shutil.rmtree(moving)
  pretrain.run(config, workdir)
  processes.assert_equal(tuned, workdir)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    (dict(model=dict(flow=dict(width=8))), 'model.flow.width is 16 there and 8 here'),
    (dict(model=dict(prior=dict(layers=2))), 'model.prior.layers is 1 there and 2 here'),
    (dict(model=dict(patch_basis='pixels')), "model.patch_basis is 'dct' there"),
    (dict(model=dict(neighborhood=True)), 'model.neighborhood is False there and True here'),
    (dict(model=dict(dtype='float64')), "model.dtype is 'float32' there and 'float64' here"),
    (dict(model=dict(patch_size=4), data=dict(image_size=16)), 'model.patch_size is 2 there'),
    (dict(data=dict(channels=3)), 'data.channels is 1 there and 3 here'),
  ],
)
def test_other_models_are_refused(source, workdir, changes, named):
  config = models.replace(tuning(source), **changes)
  with pytest.raises(errors.ConfigError) as caught:
    start_lib.open_start(config, workdir, ())
  message = str(caught.value)
  assert named in message and '--config.init_from=' in message and len(message.splitlines()) == 1


def test_unusable_sources_are_refused(source, tmp_path):
  for path, named in ((tmp_path, 'config.json'), (source / 'figures', 'config.json')):
    with pytest.raises(errors.WorkdirError, match=named):
      start_lib.open_start(tuning(path), tmp_path / 'run', ())
  empty, student = tmp_path / 'empty', tmp_path / 'student'
  for folder, teacher in ((empty, None), (student, 'X')):
    folder.mkdir()
    values = config_lib.to_dict(tiny()) | {'teacher': teacher}
    (folder / 'config.json').write_text(json.dumps(values))
  with pytest.raises(errors.CheckpointError, match='has no checkpoint'):
    start_lib.open_start(tuning(empty), tmp_path / 'run', ())
  with pytest.raises(errors.ConfigError, match='distill'):
    start_lib.open_start(tuning(student), tmp_path / 'run', ())


def branch(source, **train):
  return dataclasses.replace(tiny(**train), branch_from=str(source), name='branch')


def test_branch_without_changes_equals_its_source(source, tmp_path):
  """The source is deleted once the branch has its own checkpoint."""
  moving, workdir = tmp_path / 'source', tmp_path / 'run'
  shutil.copytree(source, moving)
  config = branch(moving / 'checkpoints' / '4')
  with runs.interrupted_after(batches=5):
    pretrain.run(config, workdir)
  assert contents(moving) == {
    path.replace(str(source), str(moving)): data for path, data in contents(source).items()
  }
  shutil.rmtree(moving)
  pretrain.run(config, workdir)
  expected, found = processes.final_state(source), processes.final_state(workdir)
  for path, leaf in expected.items():
    np.testing.assert_array_equal(found[path], leaf, err_msg=path)
  later = [r for r in processes.records(source) if r['step'] > 4]
  for a, b in zip(later, processes.records(workdir), strict=True):
    names = a.keys() - processes.TIMES
    assert {k: a[k] for k in names} == {k: b[k] for k in names}


def test_branch_of_a_missing_checkpoint_leaves_no_workdir(source, workdir):
  with pytest.raises(errors.CheckpointError, match='no checkpoint of step 5; it has 2, 4, 6, 8'):
    pretrain.run(branch(source / 'checkpoints' / '5'), workdir)
  assert not workdir.exists()


def test_branch_with_other_images_is_refused(source, workdir):
  """The record of the images of the source names other images."""
  moved = shutil.copytree(source, workdir.with_name('source'))
  record = json.loads((moved / 'data.json').read_text())
  record['training']['content'] = [f'{text}x' for text in record['training']['content']]
  (moved / 'data.json').write_text(json.dumps(record))
  with pytest.raises(errors.WorkdirError, match='images are not those of --config.branch_from'):
    pretrain.run(branch(moved / 'checkpoints' / '4'), workdir)
  assert not workdir.exists()


def test_branch_records_its_changes(source, workdir):
  config = branch(source / 'checkpoints' / '6', steps=7, extend='restart_cosine')
  config = models.replace(config, train=dict(optimizer=dict(learning_rate=1e-3)))
  pretrain.run(config, workdir)
  record = json.loads((workdir / 'init.json').read_text())
  assert record['step'] == 6 and record['changed'] == {
    'train.steps': [8, 7],
    'train.extend': ['none', 'restart_cosine'],
    'train.optimizer.learning_rate': [3e-3, 1e-3],
  }
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['train']['extensions'] == '6:8:restart_cosine'
  (first,) = (r for r in processes.records(workdir) if r['split'] == 'train')
  assert first['step'] == 7
  np.testing.assert_allclose(first['learning_rate'], 1e-3, rtol=1e-6)
  pretrain.run(config, workdir)  # A finished branch reports again.


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    (dict(train=dict(batch_size=32)), 'train.batch_size is 16 there and 32 here'),
    (dict(train=dict(ema_decay=0.0)), 'train.ema_decay is 0.9 there and 0.0 here'),
    (dict(train=dict(optimizer=dict(kind='adamw'))), "train.optimizer.kind is 'muon' there"),
    (dict(model=dict(flow=dict(max_log_scale=1.0))), 'model.flow.max_log_scale is 0.0 there'),
    (dict(seed=1), 'seed is 0 there and 1 here'),
    (dict(train=dict(steps=8)), 'train.steps is 8, and the checkpoint has step 8'),
  ],
)
def test_branch_with_another_state_or_data_is_refused(source, workdir, changes, named):
  names = layout.read_class_names(source)
  assert start_lib.open_start(branch(source, steps=9), workdir, names)
  config = models.replace(branch(source, steps=9), **changes)
  with pytest.raises(errors.ConfigError) as caught:
    start_lib.open_start(config, workdir, names)
  message = str(caught.value)
  assert named in message and '--config.branch_from=' in message and '\n' not in message


def test_branch_with_other_classes_is_refused(source, workdir):
  names = layout.read_class_names(source)[::-1]
  with pytest.raises(errors.ConfigError, match='classes of the data have other names'):
    start_lib.open_start(branch(source, steps=9), workdir, names)


@pytest.mark.faults
def test_tuning_at_another_image_size_on_eight_devices_equals_that_on_one(uninterrupted, tmp_path):
  settings = f'init_from={uninterrupted}', 'data.image_size=16', 'train.optimizer.warmup_steps=2'
  one, eight = tmp_path / 'one', tmp_path / 'eight'
  processes.train(one, *settings, devices=1).finish()
  mesh = 'mesh.data=2', 'mesh.fsdp=2', 'mesh.tensor=2'
  job = processes.train(eight, *settings, *mesh, devices=8).finish()
  assert 'interpolated from 2x2 to 4x4 tokens' in job.log()
  np.testing.assert_allclose(validations(one)[0], validations(eight)[0], rtol=1e-5)
  processes.assert_close(one, eight)


@pytest.mark.faults
def test_tuning_that_is_killed_ends_like_one_that_is_not(uninterrupted, tmp_path):
  """SIGKILL before and after the first checkpoint. The source is deleted between them."""
  source, expected, workdir = tmp_path / 'source', tmp_path / 'expected', tmp_path / 'run'
  shutil.copytree(uninterrupted, source)
  settings = (f'init_from={source}',)
  processes.train(expected, *settings, devices=1).finish()
  for step in (1, 5):
    job = processes.train(workdir, *settings, devices=1)
    job.wait_for(lambda s=step: processes.records(workdir)[-1:] and last(workdir) >= s)
    job.kill()
    if step == 5:
      shutil.rmtree(source)
  processes.train(workdir, *settings, devices=1).finish()
  processes.assert_equal(expected, workdir)


def last(workdir):
  return processes.records(workdir)[-1]['step']
