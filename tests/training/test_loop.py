"""Whole tiny runs: reproducible, resumable bit for bit, and leaving behind what the README says."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from farmer_jax import config, errors
from farmer_jax.data import pipeline
from farmer_jax.jobs import pretrain

STEPS = 6


def tiny(**train):
  return config.Config(
    name='tiny',
    data=config.Data(source='digits', flip=True),
    model=config.Model(
      patch_size=4,
      flow=config.Flow(blocks=2, layers=1, width=16, head_dim=8),
      prior=config.Prior(
        layers=1,
        width=16,
        head_dim=8,
        condition_copies=2,
        components=3,
        informative_channels=5,
        redundant_components=4,
      ),
    ),
    train=config.Train(
      **{
        'steps': STEPS,
        'batch_size': 16,
        'accumulate': 2,
        'ema_decay': 0.9,
        'log_every': 1,
        'validate_every': 3,
        'sample_every': 0,
        'checkpoint_every': 2,
        **train,
      }
    ),
    sampling=config.Sampling(per_class=2),
  )


def final_state(workdir):
  """The last checkpoint as {path: array}, read without this project's code."""
  state = ocp.StandardCheckpointer().restore(workdir / 'checkpoints' / str(STEPS) / 'state')
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def records(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def timeless(workdir):
  """The metrics without what depends on the clock."""
  clock = ('time', 'step_seconds', 'images_per_second', 'input_wait_seconds')
  return [{k: v for k, v in r.items() if k not in clock} for r in records(workdir)]


@pytest.fixture(name='whole', scope='module')
def _whole(tmp_path_factory):
  """A run without interruption."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  pretrain.run(tiny(), workdir)
  return workdir


def test_a_run_leaves_its_results(whole):
  assert (whole / 'config.json').exists()
  assert np.asarray(Image.open(whole / 'figures' / 'curves.png')).std() > 0
  assert sorted(int(p.name) for p in (whole / 'checkpoints').iterdir()) == [4, 6]
  assert list(whole.glob('events.out.tfevents.*'))
  train = [r for r in records(whole) if r['split'] == 'train']
  valid = [r for r in records(whole) if r['split'] == 'valid']
  assert [r['step'] for r in train] == list(range(1, STEPS + 1))
  assert [r['step'] for r in valid] == [3, 6]
  for r in records(whole):
    terms = r['nll_informative'] + r['nll_redundant'] + r['log_det']
    np.testing.assert_allclose(r['loss'], terms, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(r['bits_per_dim'], r['loss'] / np.log(2) + 7, rtol=1e-6)
  for r in train:
    blocks = r['log_det_block_0'] + r['log_det_block_1']
    np.testing.assert_allclose(r['log_det'], blocks, atol=1e-6)
    assert r['images_per_second'] > 0
    assert r['learning_rate'] > 0


def test_the_loss_falls(whole):
  losses = [r['loss'] for r in records(whole) if r['split'] == 'train']
  assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_run(whole, tmp_path):
  pretrain.run(tiny(), tmp_path / 'again')
  assert timeless(whole) == timeless(tmp_path / 'again')
  for path, leaf in final_state(whole).items():
    np.testing.assert_array_equal(leaf, final_state(tmp_path / 'again')[path], err_msg=path)


def test_an_interrupted_run_ends_like_the_whole_one(whole, tmp_path, monkeypatch, capfd):
  """Stopped at step 5, after the checkpoint of step 4: step 5 is repeated, and logged once."""
  make_iterator = pipeline.train_iterator

  class Interrupted(Exception):
    pass

  def interrupted_iterator(*args):
    iterator = make_iterator(*args)
    take = iterator.__class__.__next__

    class Stopping(iterator.__class__):
      def __next__(self):
        if self.get_state()['batches'] == 5:
          raise Interrupted
        return take(self)

    iterator.__class__ = Stopping
    return iterator

  workdir = tmp_path / 'run'
  monkeypatch.setattr(pipeline, 'train_iterator', interrupted_iterator)
  with pytest.raises(Interrupted):
    pretrain.run(tiny(), workdir)
  assert [r['step'] for r in records(workdir)][-1] == 5
  monkeypatch.setattr(pipeline, 'train_iterator', make_iterator)
  pretrain.run(tiny(), workdir)
  assert 'Going on from step 4 of 6' in capfd.readouterr().err
  assert timeless(workdir) == timeless(whole)
  whole_state, resumed = final_state(whole), final_state(workdir)
  assert whole_state.keys() == resumed.keys()
  assert any('average' in path for path in resumed)
  for path, leaf in whole_state.items():
    np.testing.assert_array_equal(leaf, resumed[path], err_msg=path)


def test_a_finished_run_reports_again_without_training(whole, capsys):
  before = (whole / 'metrics.jsonl').read_text()
  pretrain.run(tiny(), whole)
  assert 'bits/dim' in capsys.readouterr().out
  assert (whole / 'metrics.jsonl').read_text() == before


def test_steps_are_recorded_also_by_a_run_that_goes_on(tmp_path):
  """The range begins before the checkpoint that the second half goes on from, and ends after the
  last step."""
  workdir = tmp_path / 'run'
  pretrain.run(tiny(validate_every=0), workdir)
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  recorded = dataclasses.replace(
    tiny(validate_every=0), profile=config.Profile(steps=f'2,{STEPS + 9}')
  )
  pretrain.run(recorded, workdir)
  assert list((workdir / 'profile').rglob('*.xplane.pb'))


def test_another_model_in_the_workdir_is_refused(whole):
  before = sorted(str(p) for p in whole.rglob('*'))
  other = tiny(batch_size=32)
  with pytest.raises(errors.ConfigError, match='train.batch_size is 16 there and 32 here'):
    pretrain.run(other, whole)
  assert sorted(str(p) for p in whole.rglob('*')) == before
