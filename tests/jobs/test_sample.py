"""The sampling job on a real run: resumable, extensible, and clear about what is wrong."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from farmer_jax import api, config, errors, sampling
from farmer_jax.evaluation import sampling_figures
from farmer_jax.jobs import sample
from farmer_jax.nn import farmer
from farmer_jax.workdir import results
from tests.support.runs import CONFIG


def with_sampling(**changes):
  settings = dict(count=25, batch_size=8, inverse='sequential') | changes
  return dataclasses.replace(CONFIG, sampling=config.Sampling(**settings))


def arrays(folder):
  """All samples of a folder."""
  parts = [np.load(file) for file in sorted(folder.glob('*.npz'))]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0].files}


def test_leaves_images_a_grid_and_a_report(run, capsys):
  before = (run / 'config.json').read_text()
  sample.run(with_sampling(png=True), run)
  folder = run / 'samples' / '3-inverse=sequential'
  samples = arrays(folder)
  assert samples['arr_0'].shape == (25, 8, 8, 1) and samples['arr_0'].dtype == np.uint8
  np.testing.assert_array_equal(samples['arr_1'], np.arange(25) % 10)
  assert len(np.unique(samples['arr_0'], axis=0)) == 25
  report = json.loads((folder / 'samples.json').read_text())
  assert report['count'] == 25 and report['checkpoint_step'] == 3
  assert report['nonfinite_samples'] == int((~samples['finite']).sum()) == 0
  assert report['seconds_per_image']['inverse'] > 0
  assert Image.open(folder / 'grid.png').size[0] > 2 * 56
  single = np.asarray(Image.open(folder / 'png' / '000007.png'))
  np.testing.assert_array_equal(single, samples['arr_0'][7].repeat(3, -1))
  assert (run / 'config.json').read_text() == before
  out = capsys.readouterr().out
  assert 'Not finite: 0' in out and 'grid.png' in out


def test_more_images_later_are_what_they_would_have_been(run, monkeypatch):
  """Also across shards, and whatever the batch size."""
  monkeypatch.setattr(results, 'SHARD_SIZE', 10)
  folder = run / 'samples' / '3-inverse=sequential'
  sample.run(with_sampling(count=37), run)
  whole = arrays(folder)
  assert len(list(folder.glob('*.npz'))) == 4
  shutil.rmtree(folder)
  for count, batch_size in ((5, 8), (23, 7), (37, 16)):
    sample.run(with_sampling(count=count, batch_size=batch_size), run)
    parts = arrays(folder)
    assert len(parts['arr_0']) == count
    difference = abs(parts['arr_0'].astype(int) - whole['arr_0'][:count])
    # Batches of another size round differently now and then.
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    np.testing.assert_array_equal(parts['arr_1'], whole['arr_1'][:count])


def test_a_killed_job_goes_on_where_it_stopped(run):
  """A real process, killed between two batches; bit for bit."""
  program = f"""
import os, signal
from farmer_jax.workdir import results
results.SHARD_SIZE, results._SECONDS_BETWEEN_WRITES = 12, 0.0
append = results.Shards.append
def killing(self, **arrays):
  append(self, **arrays)
  if len(self) >= 16:
    os.kill(os.getpid(), signal.SIGKILL)
results.Shards.append = killing
from farmer_jax import config
from farmer_jax.workdir import results
from farmer_jax.jobs import sample
sample.run(config.from_config_dict({config.to_dict(with_sampling())!r}), {str(run)!r})
"""
  killed = subprocess.run([sys.executable, '-c', program], capture_output=True)
  assert killed.returncode == -9, killed.stderr
  folder = run / 'samples' / '3-inverse=sequential'
  left = arrays(folder)
  assert len(left['arr_0']) == 16 and not (folder / 'samples.json').exists()
  program = program.replace('>= 16', '> 99')
  subprocess.run([sys.executable, '-c', program], check=True, capture_output=True)
  resumed = arrays(folder)
  shutil.rmtree(folder)
  subprocess.run([sys.executable, '-c', program], check=True, capture_output=True)
  for name, values in arrays(folder).items():
    np.testing.assert_array_equal(resumed[name], values)
    np.testing.assert_array_equal(left[name], values[:16])


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'another file'])
def test_a_damaged_shard_is_drawn_again(run, damage, capsys):
  folder = run / 'samples' / '3-inverse=sequential'
  sample.run(with_sampling(), run)
  whole = arrays(folder)
  (file,) = folder.glob('*.npz')
  content = file.read_bytes()
  file.write_bytes({'truncated': content[:-100], 'empty': b'', 'another file': b'hello'}[damage])
  sample.run(with_sampling(), run)
  assert 'is damaged' in capsys.readouterr().err
  for name, values in arrays(folder).items():
    np.testing.assert_array_equal(values, whole[name])


def test_settings_have_folders_of_their_own():
  name = sample.folder_name(config.Sampling(count=9, png=True, batch_size=2), 700)
  assert name == '700'
  guidance = config.Guidance(scale=2.5)
  name = sample.folder_name(config.Sampling(guidance=guidance, labels='a/b, c', seed=1), 700)
  assert name == '700-labels=a_b,_c-seed=1-scale=2.5'
  names = {sample.folder_name(config.Sampling(labels='3,' * n), 1) for n in (200, 201)}
  assert len(names) == 2 and all(len(n) < 200 for n in names)


def test_labels_by_number_name_and_none(trained):
  def parse(labels, names=(), **data):
    built = dataclasses.replace(
      CONFIG,
      data=dataclasses.replace(CONFIG.data, **data),
      sampling=config.Sampling(labels=labels),
    )
    return sample.parse_labels(built, names)

  assert parse('') == list(range(10))
  assert parse('3,3, 7,none') == [3, 3, 7, 10]
  assert parse('dog,0,cat', ('cat', 'dog'), num_classes=2) == [1, 0, 0]
  assert parse('', num_classes=0) == [0] and parse('none', num_classes=0) == [0]
  for wrong in ('10', '-1', 'bird', '1.5'):
    with pytest.raises(errors.ConfigError, match='no class'):
      parse(f'3,{wrong}')
  with pytest.raises(errors.ConfigError, match='cat, dog'):
    parse('bird', ('cat', 'dog'), num_classes=2)


def test_figures(run):
  sample.run(with_sampling(count=4, figures=True, max_classes=3), run)
  for name, columns in (('guidance', 7), ('redundant', 9), ('denoising_path', 3)):
    picture = np.asarray(Image.open(run / 'figures' / f'{name}.png'))
    assert abs(picture.shape[1] - columns * 60) < 40 and picture.std() > 10


def test_the_plan_is_kept_and_used_again(run, capsys):
  built = with_sampling(inverse='parallel')
  sample.run(built, run)
  plans = json.loads((run / 'inverse_plan.json').read_text())
  ((key, plan),) = plans.items()
  assert 'parallel' in key and 'step 3' in key
  assert plan['chunks'] == [15, 15] and plan['difference'] < 1e-4
  capsys.readouterr()
  sample.run(built, run)
  assert 'Measuring' not in capsys.readouterr().err
  sample.run(with_sampling(inverse='parallel', tolerance=1e-3), run)
  assert 'Measuring' in capsys.readouterr().err


def test_parallel_and_sequential_inverse_give_the_same_images(run):
  sample.run(with_sampling(inverse='parallel'), run)
  sample.run(with_sampling(), run)
  parallel, sequential = (
    arrays(run / 'samples' / f'3-inverse={name}')['arr_0'].astype(int)
    for name in ('parallel', 'sequential')
  )
  assert abs(parallel - sequential).max() <= 1


WRONG = {
  'negative count': ('--config.sampling.count=-3', 'must be above 0'),
  'scale that is no number': ('--config.sampling.guidance.scale=nan', 'must be finite'),
  'unknown class': ('--config.sampling.labels=dragon', "no class 'dragon'"),
  'another model': ('--config.model.patch_size=4', 'another configuration'),
  'denoising a density model': ('--config.sampling.denoise=True', 'gaussian'),
  'unknown inverse': ('--config.sampling.inverse=magic', 'must be one of'),
}


@pytest.mark.parametrize('override, message', WRONG.values(), ids=WRONG)
def test_mistakes_get_one_line(trained, override, message):
  files = sorted(trained.rglob('*'))
  command = [sys.executable, '-m', 'farmer_jax.main', '--job=sample', f'--workdir={trained}']
  command += [f'--config=configs/from_run.py:{trained}', override]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 1
  (line,) = [row for row in done.stderr.splitlines() if row.startswith('error: ')]
  assert message in line and 'Traceback' not in done.stderr
  assert sorted(trained.rglob('*')) == files


def test_a_run_without_a_checkpoint_and_no_run_at_all(run, tmp_path):
  shutil.rmtree(run / 'checkpoints')
  with pytest.raises(errors.ConfigError, match='no checkpoint yet'):
    sample.run(with_sampling(), run)
  with pytest.raises(errors.ConfigError, match='not a run'):
    sample.run(with_sampling(), tmp_path / 'elsewhere')
  assert not (tmp_path / 'elsewhere').exists()


def test_guidance_needs_what_it_compares_with():
  guided = config.Sampling(guidance=config.Guidance(scale=1.0))
  unconditional = dataclasses.replace(
    CONFIG, sampling=guided, data=dataclasses.replace(CONFIG.data, num_classes=0)
  )
  never_dropped = dataclasses.replace(
    CONFIG, sampling=guided, model=dataclasses.replace(CONFIG.model, label_dropout=0.0)
  )
  tarflow = dataclasses.replace(
    CONFIG, sampling=guided, model=dataclasses.replace(CONFIG.model, prior=config.Prior('normal'))
  )
  for built in (unconditional, never_dropped, tarflow):
    with pytest.raises(errors.ConfigError, match='config.sampling.guidance.scale=0'):
      config.check(built)


def test_the_path_ends_in_the_image(run, monkeypatch):
  """The last stage is the sample itself; the stages before it are other pictures."""
  seen = {}

  def keep(images, names, titles):
    seen.update(images=images, titles=titles)
    return np.zeros((4, 4, 3), np.uint8)

  monkeypatch.setattr(sampling_figures.figures, 'sample_grid', keep)
  model = farmer.build(CONFIG)
  params, _ = api.load_params(CONFIG, run, model)
  sampling_figures.path(model, CONFIG, params, [3, 4], ['3', '4'])
  expected = sampling.Sampler(model, CONFIG)(params, [3, 4], [0, 1]).images
  assert seen['titles'] == ['z^2', 'z^1', 'z^0'] and seen['images'].shape[:2] == (2, 3)
  np.testing.assert_array_equal(seen['images'][:, -1], expected)
