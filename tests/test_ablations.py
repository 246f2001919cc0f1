"""The dataset of emoji, and the ablations that are measured on it."""

import dataclasses
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

from benchmarks import ablations, emoji, variants
from farmer_jax import config as config_lib
from farmer_jax.errors import UserError
from farmer_jax.evaluation import classifier

CATEGORIES = 'Smileys & Emotion', 'Flags', 'Component'


def make_package(path, vendor, count=40):
  """Writes an npm package with `count` emoji, of which every third has a skin tone."""
  entries, files = [], {}
  for index in range(count):
    entry = {'unified': f'1F{index:03}', 'sort_order': count - index}
    entry['category'] = CATEGORIES[index % len(CATEGORIES)]
    variant = {'unified': f'1F{index:03}-1F3FB'}
    for member in (entry, variant):
      member['image'] = f'{member["unified"].lower()}.png'
      member['has_img_google'] = member['has_img_twitter'] = True
      image = Image.new('RGBA', (64, 64), (255, 0, 0, 0))
      image.paste((index, 0, 0, 255), (0, 0, 32, 64))
      stream = io.BytesIO()
      image.save(stream, 'png')
      files[f'package/img/{vendor}/64/{member["image"]}'] = stream.getvalue()
    entries.append(entry | ({'skin_variations': {'1F3FB': variant}} if index % 3 == 0 else {}))
  entries[4][f'has_img_{vendor}'] = False
  files['package/emoji.json'] = json.dumps(entries).encode()
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('emoji')
  packages = [make_package(path / f'{vendor}.tgz', vendor) for vendor in emoji.VENDORS]
  counts = emoji.write(packages, path / 'images')
  # 14 of 40 emoji have a skin tone, 13 are components, and two vendors lack one image each.
  assert sum(counts.values()) == 2 * (40 - 13 + 14 - 1)
  return path / 'images'


def test_no_emoji_is_in_both_splits(folder):
  emoji_of_split = {
    split: {path.name[:5] for path in (folder / split).glob('*/*.png')}
    for split in ('train', 'valid')
  }
  assert not emoji_of_split['train'] & emoji_of_split['valid']
  assert 2 <= len(emoji_of_split['valid']) <= 4
  assert {path.name for path in (folder / 'train').iterdir()} == {'flags', 'smileys_and_emotion'}


def test_emoji_are_on_white(folder):
  path = next((folder / 'train' / 'flags').glob('1f022-google.png'))
  pixels = np.asarray(Image.open(path))
  assert pixels.shape == (64, 64, 3)
  assert (pixels[:, :32] == (22, 0, 0)).all() and (pixels[:, 32:] == 255).all()


@pytest.mark.parametrize('content', [b'', b'no archive', None])
def test_wrong_packages_are_named(tmp_path, content):
  path = tmp_path / 'package.tgz'
  if content is None:
    make_package(path, 'other')
  else:
    path.write_bytes(content)
  with pytest.raises(UserError, match='package.tgz'):
    list(emoji.images(path))


def test_wrong_second_package_leaves_no_folder(tmp_path):
  packages = [make_package(tmp_path / 'google.tgz', 'google'), tmp_path / 'missing.tgz']
  with pytest.raises(UserError, match='missing.tgz'):
    emoji.write(packages, tmp_path / 'images')
  assert not (tmp_path / 'images').exists()


def test_missing_npm_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(UserError, match='npm'):
    emoji.download(tmp_path)


@pytest.mark.parametrize('data', ['emoji', 'photos'])
def test_ablations_change_their_keys_only(data):
  table = ablations.Ablations(data, 'data', epath.Path('folder'))
  full = table.configuration('+ final permutation: the full model', seed=0)
  for name, changes in ablations.VARIANTS.items():
    variant = table.configuration(name, seed=0)
    config_lib.check(variant)
    different = {
      path
      for path, _ in config_lib.leaves()
      if config_lib.get(variant, path) != config_lib.get(full, path)
    }
    assert different <= set(changes), name
  sizes = [ablations.VARIANTS[name] for name in list(ablations.VARIANTS)[:4]]
  assert sizes[3] == {} and [len(changes) for changes in sizes] == [3, 2, 1, 0]


def test_keys_are_multiplied_and_added():
  values = config_lib.defaults()
  changes = {
    'train.steps': '×0.5',
    'model.flow.blocks': '+2',
    'seed': lambda values: values.model.flow.blocks * 10,
    'train.optimizer.b2': 0.99,
  }
  variants.set_keys(values, changes)
  assert (values.train.steps, values.model.flow.blocks) == (500, 6)
  assert values.seed == 60 and values.train.optimizer.b2 == 0.99


def test_finished_runs_are_read_and_runs_without_the_last_checkpoint_are_trained(
  tmp_path, monkeypatch
):
  config, calls = config_lib.from_config_dict(config_lib.defaults()), []
  record = {'step': config.train.steps, 'split': 'valid', 'loss': 1.0}
  checkpoint = tmp_path / 'checkpoints' / str(config.train.steps)

  def run(config, workdir):
    calls.append(workdir)
    checkpoint.mkdir(parents=True)
    (workdir / 'metrics.jsonl').write_text(json.dumps(record) + '\n')

  monkeypatch.setattr(variants.pretrain, 'run', run)
  for is_saved, expected in ((False, 1), (True, 1), (False, 2)):
    if not is_saved:
      shutil.rmtree(checkpoint, ignore_errors=True)
    assert variants.validate(config, tmp_path) == record and len(calls) == expected


@pytest.mark.slow
def test_table_has_likelihood_and_sample_quality(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(classifier, '_STEPS', 20)
  tiny = {'data.num_classes': 2, 'data.image_size': 16, 'train.valid_batch_size': 4}
  tiny |= {'model.flow.blocks': 1, 'model.prior.layers': 1}
  make, small = ablations._DATA['emoji']
  monkeypatch.setitem(ablations._DATA, 'emoji', (make, small | tiny))
  names = ['+ final permutation: the full model', 'TARFlow: standard normal prior']
  sizes = dict(steps=2, count=8, batch_size=8)
  table = ablations.Ablations('emoji', str(folder), epath.Path(tmp_path), **sizes)
  full = table.row(names[0])
  tarflow = dataclasses.replace(table, seeds=1).row(names[1])
  # A second call reads all results, and trains nothing.
  monkeypatch.setattr(variants, 'validate', None)
  assert table.row(names[0]) == full
  assert float(full['nats/dim'].split(' ± ')[0]) > -10 and '±' in full['nats/dim']
  assert 0 <= float(full['resampling: precision'].split()[0]) <= 1
  assert tarflow['resampling: distance'] == '–' and tarflow['no guidance: distance'] != '–'
  ablations.draw_figure(tmp_path / 'figure.png', [full, tarflow])
  assert np.asarray(Image.open(tmp_path / 'figure.png')).std() > 0
