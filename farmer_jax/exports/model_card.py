"""The model card of an export: README.md, with the metadata of the Hugging Face hub."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from flax import traverse_util

from farmer_jax import config as config_lib
from farmer_jax.workdir import layout, metrics

PICTURE_FILE, TORCH_FILE = 'samples.png', 'torch_farmer.py'

# Settings of results that their row describes in words, that change no result, or that are paths.
_HIDDEN = {'name', 'source', 'split', 'path', 'ood_path', 'samples', 'reference', 'weights'}
_HIDDEN |= {'count', 'batch_size', 'png', 'figures', 'densities', 'grid_columns', 'grid_rows'}
_HIDDEN |= {'reference_split', 'labels'}

_METRICS = {
  'bits_per_dim': 'negative log-likelihood, bits/dim',
  'loss': 'negative log-likelihood, nats/dim',
  'psnr': 'reconstruction by the student, PSNR in dB',
}


class Result(NamedTuple):
  """A row of the table of results."""

  metric: str
  value: float
  images: str
  settings: str


def read_results(config: config_lib.Config, folder: epath.Path, step: int) -> Iterator[Result]:
  """Yields the results in a workdir, or in a folder of results, for the checkpoint of `step`."""
  if (folder / 'metrics.jsonl').exists():
    yield from _validation(config, metrics.read(folder), step)
  for kind, read in (('likelihood', _likelihood), ('fidelity', _fidelity)):
    for file in sorted((folder / kind).glob('*.json')):
      report = layout.read_dict(file)
      if report.get('checkpoint_step') == step:
        yield from read(config, report)


def find_samples(folder: epath.Path, step: int) -> tuple[epath.Path, str] | None:
  """Returns a grid of samples of a checkpoint and its settings: the newest grid of --job=sample."""
  found = []
  for file in (folder / 'samples').glob('*/samples.json'):
    report = layout.read_dict(file)
    if report.get('checkpoint_step') == step and (file.parent / 'grid.png').exists():
      settings = _not_default(config_lib.Sampling, report.get('sampling', {}))
      found.append((file.stat().mtime, file.parent / 'grid.png', settings))
  if found:
    return max(found)[1:]
  file = folder / 'samples' / f'{step}.png'
  return (file, 'those of training') if file.exists() else None


def _validation(
  config: config_lib.Config, records: Sequence[dict[str, Any]], step: int
) -> Iterator[Result]:
  found: dict[str, Any] = {}
  for record in records:  # A run that was resumed can have several records.
    if record['split'] == 'valid' and record['step'] == step:
      found = record
  # A loss of a student is not a likelihood.
  for name in ('psnr', 'bits_per_dim', 'loss'):
    if name in found:
      noise = f', σ = {found["noise_std"]:g}' if 'noise_std' in found else ''
      images = f'validation, {config.train.valid_examples or "all"} images'
      yield Result(_METRICS[name], found[name], images, f'during training{noise}')
      return


def _likelihood(config: config_lib.Config, report: Mapping[str, Any]) -> Iterator[Result]:
  settings = report['settings']
  source = settings.get('source') or config.data.source
  images = f'{source}, {settings.get("split")}, {report["count"]} images'
  described = _not_default(config_lib.Likelihood, settings)
  kind = 'bits_per_dim' if 'bits_per_dim' in report else 'loss'
  names = {kind: f'negative log-likelihood, {report["unit"]}'}
  names['bits_per_dim_importance'] = 'importance-weighted bound, bits/dim'
  for key, name in names.items():
    if (report.get(key) or {}).get('mean') is not None:
      yield Result(name, report[key]['mean'], images, described)
  if 'accuracy' in report:
    yield Result('accuracy as a classifier', report['accuracy'], images, described)


def _fidelity(config: config_lib.Config, report: Mapping[str, Any]) -> Iterator[Result]:
  images = f'{report["count"]} samples; reference: {epath.Path(report["reference"]).name}'
  sampling = _not_default(config_lib.Sampling, report.get('sampling', {}))
  settings = _not_default(config_lib.Fidelity, report['settings'])
  for name, value in report.items():
    if isinstance(value, float):
      yield Result(f'{name} ({report["network"]})', value, images, f'{sampling}; {settings}')


def _not_default(section: type, settings: Mapping[str, Any]) -> str:
  """Lists the settings of a section that are not the defaults."""
  defaults = {path: key.default for path, key in config_lib.leaves(section)}
  values = traverse_util.flatten_dict(dict(settings), sep='.')
  found = {k: v for k, v in values.items() if v != defaults.get(k) and k not in _HIDDEN}
  return ', '.join(f'`{key}={value}`' for key, value in found.items()) or 'defaults'


def render(
  config: config_lib.Config,
  record: Mapping[str, Any],
  num_params: int,
  data: Mapping[str, Any],
  results: Sequence[Result],
  picture: str | None,
) -> str:
  """Returns the text of the card.

  Args:
    config: the configuration of the run.
    record: the content of config.json of the export.
    num_params: the number of exported parameters.
    data: the content of data.json of the run, or {}.
    results: the rows of the table of results.
    picture: the settings of the samples in `PICTURE_FILE`, or None without samples.
  """
  license_ = config.export.license
  sections = [
    _front_matter(license_ or 'unknown'),
    f'# {config.name}\n\n{_introduction(config)}',
    *([f'![Samples]({PICTURE_FILE})\n\nSamples, settings: {picture}.'] if picture else []),
    f'## Model\n\n{_bullets(_model(config, record, num_params))}',
    f'## Data and training\n\n{_bullets(_training(config, record, data))}',
    f'## Results\n\n{_table(results)}',
    f'## Use\n\n{_usage(config, record)}',
    '## License\n\n' + (f'{license_}.' if license_ else 'The license of the weights is unknown.'),
  ]
  return '\n\n'.join(sections) + '\n'


def _front_matter(license_: str) -> str:
  tags = ('farmer', 'normalizing-flow', 'autoregressive', 'image-generation', 'jax', 'pytorch')
  head = [f'license: {license_}', 'library_name: farmer_jax']
  head += ['pipeline_tag: unconditional-image-generation', 'tags:', *(f'- {tag}' for tag in tags)]
  return '\n'.join(['---', *head, '---'])


def _introduction(config: config_lib.Config) -> str:
  student = '' if config.teacher is None else ' A distilled student inverts its flow in one pass.'
  return textwrap.fill(
    'A FARMER model (Flow AutoRegressive Transformer over Pixels,'
    ' [arXiv 2510.23588](https://arxiv.org/abs/2510.23588)) of images: an invertible flow maps the'
    ' patches of an image to latent tokens, and an autoregressive mixture prior models the tokens.'
    f' It draws images and computes their exact likelihood.{student}',
    100,
  )


def _model(config: config_lib.Config, record: Mapping[str, Any], num_params: int) -> list[str]:
  data, model, flow, prior = config.data, config.model, config.model.flow, config.model.prior
  size, channels = data.image_size, {1: 'gray', 3: 'RGB'}[data.channels]
  lines = [
    f'{num_params:,} parameters, checkpoint of step {record["step"]}'
    + (', averaged over training steps' if record['parameters'] == 'ema_params' else ''),
    f'images of {size}×{size} pixels, {channels}, {data.num_classes or "no"} classes',
    f'{config.num_tokens} tokens of {config.token_channels} channels (patches of'
    f' {model.patch_size}×{model.patch_size} pixels, basis {model.patch_basis})',
    f'flow: {flow.kind}, {flow.blocks} blocks of {flow.layers} layers, width {flow.width}',
  ]
  if prior.kind == 'normal':
    return [*lines, 'prior: independent standard normals']
  informative = prior.num_informative_channels(config.token_channels)
  return [
    *lines,
    f'prior: {prior.layers} layers, width {prior.width}, {prior.components} mixture components,'
    f' {informative} of {config.token_channels} channels informative',
  ]


def _training(
  config: config_lib.Config, record: Mapping[str, Any], data: Mapping[str, Any]
) -> list[str]:
  train, noise = config.train, config.noise
  images = ''.join(f', {data[k]["images"]} {k} images' for k in data if 'images' in data[k])
  names = ', '.join(name[:30].replace('`', "'") for name in record['class_names'][:20])
  kinds = {
    'uniform': 'uniform dequantization',
    'gaussian': f'Gaussian noise, σ = {noise.std_end:g}',
  }
  lines = [f'data: {config.data.source}{images}', *([f'classes: `{names}`'] if names else [])]
  return [
    *lines,
    f'noise: {kinds[noise.kind]} in evaluation',
    f'{train.steps} steps of {train.batch_size} images, {train.optimizer.kind}, learning rate'
    f' {train.optimizer.learning_rate:g}',
    *_origin(config),
    'all settings: `config.json`',
  ]


def _origin(config: config_lib.Config) -> list[str]:
  """Describes the run from which this run started, if there is one, without its folder."""
  source = config.init_from or config.branch_from
  if not source:
    return []
  source = re.sub(r'/checkpoints/(\d+)$', r' at step \1', source.rstrip('/')).rpartition('/')[-1]
  parts = 'flow and the prior' if config.init_parts == 'all' else config.init_parts
  if config.branch_from:
    return [f'the run is a branch of the run `{source}`']
  return [f'the {parts} started from the trained parameters of `{source}`']


def _table(results: Sequence[Result]) -> str:
  if not results:
    return 'No results were recorded for this checkpoint.'
  lines = ['| metric | value | images | settings |', '| --- | --- | --- | --- |']
  for row in results:
    cells = row.metric, f'{row.value:.4f}', row.images, row.settings
    lines.append(f'| {" | ".join(" ".join(c.replace("|", "/").split()) for c in cells)} |')
  return '\n'.join(lines)


def _usage(config: config_lib.Config, record: Mapping[str, Any]) -> str:
  labels = '[0, 1]' if config.data.num_classes else '[None, None]'
  tensor = 'torch.tensor([0, 1])' if config.data.num_classes else 'torch.zeros(2, dtype=torch.long)'
  return textwrap.dedent(f"""\
    FOLDER is a copy of this repository, or `hf://USER/NAME` with the package `huggingface_hub`.

    ```python
    import farmer_jax  # version {record['farmer_jax_version']}

    run = farmer_jax.load('FOLDER')
    images = run.sample({labels})  # uint8 [2, H, W, C]
    run.log_prob(images, {labels}).nats
    ```

    In PyTorch, `{TORCH_FILE}` needs no other file of farmer_jax. Copy it beside your program:

    ```python
    import torch
    import {TORCH_FILE.removesuffix('.py')}

    model = {TORCH_FILE.removesuffix('.py')}.load('FOLDER')  # a folder
    labels = {tensor}
    values = model.sample(labels)  # real values [2, C, H, W]; to_uint8 returns images
    model.log_prob(values, labels)  # nats
    ```""")


def _bullets(lines: Sequence[str]) -> str:
  return '\n'.join(f'- {line}' for line in lines)
