"""`--job=export`: writes the weights, the configuration and a model card for other programs."""

import dataclasses
import pathlib
from typing import Any

import jax
from absl import logging
from etils import epath
from flax import traverse_util

import farmer_jax
from farmer_jax import api, exports, terminal
from farmer_jax import config as config_lib
from farmer_jax.errors import WorkdirError
from farmer_jax.exports import model_card
from farmer_jax.workdir import layout, stores

# Keys of paths on the machine of the run, which are not published.
_PATHS = (
  *('init_from', 'branch_from', 'data.path', 'results', 'likelihood.path', 'likelihood.ood_path'),
  *('export.path', 'fidelity.samples', 'fidelity.reference', 'fidelity.weights'),
)

# A symbolic link to examples/torch_farmer.py, so that wheels contain the file.
_TORCH_FILE = pathlib.Path(exports.__file__).parent / model_card.TORCH_FILE


def run(config: config_lib.Config, workdir: epath.PathLike) -> epath.Path:
  """Writes the export of a run. All processes restore the parameters, and process 0 writes.

  Returns:
    The folder of the export.

  Raises:
    WorkdirError: the workdir is an export, or the folder has other files or is not writable.
  """
  model_run, settings = api.Run(workdir, config, config.export.step), config.export
  workdir = model_run.workdir
  if layout.read_export(workdir):
    raise WorkdirError(f'{workdir} is an export already; --job=export needs the workdir of a run')
  if settings.path is None and stores.is_store(workdir):
    raise WorkdirError(f'{workdir} is in an object store; set --config.export.path=FOLDER')
  folder = exports.check_folder(settings.path or workdir / 'export')
  params = model_run.params
  if jax.process_index():
    return folder
  record = _record(config, model_run)
  count = sum(a.size for a in jax.tree.leaves(params))
  files = _files(config, model_run, record, count)
  with model_run.activate():
    exports.write(folder, params, record, files, settings.max_file_gigabytes * 1e9)
  terminal.print_result(f'{count:,} parameters of {workdir}, step {record["step"]}: {folder}')
  terminal.print_result(f'To publish them: hf upload USER/NAME {folder}')
  return folder


def _record(config: config_lib.Config, model_run: api.Run) -> dict[str, Any]:
  """Returns the content of config.json. `farmer_jax.exports` describes it."""
  step, teacher_step = model_run.step, None
  if config.teacher is not None:
    teacher_step = model_run.density[1]
    # The export contains the teacher, so that the name has no effect.
    config = dataclasses.replace(config, teacher=layout.absolute(config.teacher).name)
  config = dataclasses.replace(config, job=model_run.trained_config.job)
  values = traverse_util.flatten_dict(config_lib.to_dict(config), sep='.')
  values |= {**dict.fromkeys(_PATHS), 'init_parts': 'all'}
  return {
    'model_type': 'farmer',
    'export_format': layout.EXPORT_FORMAT,
    'farmer_jax_version': farmer_jax.__version__,
    'step': step,
    'teacher_step': teacher_step,
    'parameters': config.train.evaluated_params,
    'class_names': list(model_run.class_names),
    'config': traverse_util.unflatten_dict(values, sep='.'),
  }


def _files(
  config: config_lib.Config, model_run: api.Run, record: dict[str, Any], count: int
) -> dict[str, bytes]:
  """Returns the other files of the export: the model card, samples, and the PyTorch model."""
  step, files = record['step'], {}
  sources = [(model_run.workdir, step)]
  if config.results:
    sources.append((layout.absolute(config.results), step))
  samples = next(filter(None, (model_card.find_samples(*source) for source in sources)), None)
  if config.teacher is not None:
    sources.append((layout.absolute(config.teacher), record['teacher_step']))
  results = [row for source in sources for row in model_card.read_results(config, *source)]
  if samples:
    files[model_card.PICTURE_FILE] = samples[0].read_bytes()
  else:
    logging.warning(f'The card has no samples of step {step}. --job=sample draws some.')
  files[model_card.TORCH_FILE] = _TORCH_FILE.read_bytes()
  described = layout.read_dict(model_run.workdir / 'data.json')
  text = model_card.render(config, record, count, described, results, samples and samples[1])
  return files | {'README.md': text.encode()}
