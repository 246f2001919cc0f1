"""Trains FARMER models, and samples from and evaluates trained models.

Examples:
  farmer_jax --config=quickstart --workdir=runs/quickstart
  python -m farmer_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import contextlib
import difflib
import os
import pathlib
import re
import signal
import sys
import traceback

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from farmer_jax import config as config_lib
from farmer_jax import errors, terminal

_CONFIG_FILES = pathlib.Path(__file__).parent / 'configs'
_CONFIG_NAMES = sorted(file.stem for file in _CONFIG_FILES.glob('[!_]*.py'))

_NAMES_AND_FILES = f'give FILE.py or one of these names: {", ".join(_CONFIG_NAMES)}'
_NO_CONFIG = f'no --config given, for example --config=quickstart; {_NAMES_AND_FILES}'

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  help_string='Configuration, NAME[:VARIANT] or FILE.py[:VARIANT], for example in256:1.9b-p8 or'
  f' configs/in256.py:1.9b-p8. Names: {", ".join(_CONFIG_NAMES)}. Override a key with'
  ' --config.KEY=VALUE, for example --config.train.steps=100. --config_help lists all keys.',
)
_CONFIG_HELP = flags.DEFINE_bool(
  'config_help', False, 'Print all keys of the configuration, with defaults and meanings, and exit.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'host:port of process 0, for a job of several processes if the environment does not provide it.'
  ' Requires --num_processes and --process_id.',
)
_DEBUG = flags.DEFINE_bool('debug', False, 'Print the traceback of every error.')
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'Run as one process of a job of several processes whose environment provides the address of'
  ' process 0, the number of processes and the index of this process, as TPU pods, SLURM, Open MPI'
  ' and Kubernetes do.',
)
_JOB = flags.DEFINE_string(
  'job',
  None,
  'pretrain, distill, sample, likelihood, fidelity, compile or export. Default: the key job of the'
  ' configuration.',
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of processes of the job.')
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Index of this process, from 0 to num_processes - 1.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder of the run, for checkpoints, metrics and results. If it contains a run with the same'
  ' configuration, the job resumes that run. Default: runs/NAME, where NAME is the key name of the'
  ' configuration, and RUN with --config=from_run:RUN.',
)


def main(argv: list[str]) -> None:
  """Runs the job that the configuration names."""
  terminal.configure_logging()
  if _CONFIG_HELP.value:
    _print_help()
    return
  if len(argv) > 1:
    raise errors.ConfigError(f'unexpected argument {argv[1]!r}; flags start with --')
  values = _config_values()
  if _JOB.value:
    values.job = _JOB.value
  config = config_lib.from_config_dict(values)
  config_lib.check(config)
  # JAX is imported after the checks, so that errors in flags are reported without delay.
  try:
    import jax
  except ValueError as error:  # JAX reads its options from the environment.
    options = ', '.join(f'{name}={os.environ[name]}' for name in os.environ if 'JAX_' in name)
    if not options:
      raise
    raise errors.ConfigError(
      f'JAX refuses an environment variable ({error}); correct or unset it: {options}'
    ) from error

  from farmer_jax import jobs
  from farmer_jax.distributed import preemption, processes

  process = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if _DISTRIBUTED.value or any(value is not None for value in process):
    processes.start(*process)
  try:
    jobs.run(config, _WORKDIR.value or _default_workdir(config.name))
  except preemption.Preempted as preempted:
    print(preempted, file=sys.stderr)
    sys.exit(errors.EXIT_CODE_PREEMPTED)
  except errors.UserError as error:
    if not jax.distributed.is_initialized():
      raise
    # `sys.exit` waits for the other processes, which may be waiting for this process.
    _print_error(error)
    os._exit(1)


def run() -> None:
  """Entry point. After a `UserError`, prints one line on stderr and exits with code 1."""
  # TensorFlow is used only to write TensorBoard events. These variables suppress its log lines.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  # A notebook sets a backend for its own process. Figures are only written to files.
  os.environ['MPLBACKEND'] = 'agg'
  _adopt_help()
  terminal.protect_streams()
  # An exception in the middle of an import or of a callback of JAX would be lost or misleading.
  is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  previous = None if is_ignored else signal.signal(signal.SIGINT, _exit_when_interrupted)
  try:
    app.run(main, flags_parser=_parse_flags)
  except errors.UserError as error:
    _print_error(error)
    sys.exit(1)
  finally:
    if previous:
      signal.signal(signal.SIGINT, previous)


def _adopt_help() -> None:
  """Makes --help describe this module if a console script, which is then __main__, imports it."""
  script = sys.modules['__main__']
  if not script.__doc__:
    script.__doc__ = __doc__
  for flag in flags.FLAGS.flags_by_module_dict().get(__name__, []):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _exit_when_interrupted(number: int, frame: object) -> None:
  """Handles Ctrl-C while a job has nothing to save."""
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os.write(2, b'\nInterrupted. Run the same command to start the job again.\n')
  os._exit(errors.EXIT_CODE_PREEMPTED)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags. Raises ConfigError for errors in flags and in the configuration file."""
  argv = _without_none_overrides(_with_config_path(argv))
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError, flags.Error, OSError, TypeError, ValueError) as error:
    # ml_collections replaces an exception of a configuration file by another exception, whose
    # message contains a traceback.
    chain: list[BaseException] = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
      chain.append(following)
    for cause in reversed(chain):
      if isinstance(cause, errors.UserError):
        raise cause from cause.__cause__
    message = _unknown_override(argv) or ' '.join(str(error).split())
    raise errors.ConfigError(message) from error


def _with_config_path(argv: list[str]) -> list[str]:
  """Replaces the name or file in --config by a path. Raises ConfigError if there is no such file.

  For a missing file with overrides, the message of ml_collections does not start with the file.
  """
  replaced: list[str] = []
  arguments, found = iter(argv), False
  for argument in arguments:
    name, equals, value = argument.partition('=')
    if name in ('--config', '-config'):
      if found:
        raise errors.ConfigError('--config is given twice; give one configuration')
      found = True
      argument = f'--config={_config_path(value if equals else next(arguments, ""))}'
    replaced.append(argument)
  return replaced


def _config_path(value: str) -> str:
  """Returns FILE.py[:VARIANT] for the value of --config, NAME[:VARIANT] or FILE.py[:VARIANT]."""
  file, colon, variant = os.path.expanduser(value).partition(':')
  stem = os.path.basename(file).removesuffix('.py')
  if not file:
    raise errors.ConfigError(_NO_CONFIG)
  if stem == file and re.fullmatch(r'[\w-]+', file):
    if file in _CONFIG_NAMES:
      return f'{_CONFIG_FILES / file}.py{colon}{variant}'
    close = difflib.get_close_matches(file, _CONFIG_NAMES, n=1)
    hint = f'did you mean --config={close[0]}{colon}{variant}?' if close else _NAMES_AND_FILES
    raise errors.ConfigError(f'no configuration has the name {file}; {hint}')
  if os.path.isdir(file):
    raise errors.ConfigError(
      f'cannot read the --config file {file}: it is a folder; the configuration of a run is'
      f' --config=from_run:{file}'
    )
  if not os.path.isfile(file):
    known = stem in _CONFIG_NAMES
    hint = f'; use the name instead: --config={stem}{colon}{variant}' if known else ''
    raise errors.ConfigError(f'cannot read the --config file {file}: no such file{hint}')
  if not file.endswith('.py'):
    run = os.path.dirname(file) or '.'
    hint = f'; use --config=from_run:{run}' if file.endswith('config.json') else ''
    raise errors.ConfigError(f'the --config file {file} is not a Python file{hint}')
  return file + colon + variant


def _default_workdir(name: str) -> str:
  """Returns RUN for --config=from_run:RUN, and runs/NAME for other configurations.

  Two runs with the same name can exist, so the name does not identify RUN.
  """
  file, _, variant = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
  return variant if os.path.basename(file) == 'from_run.py' else f'runs/{name}'


# Paths of the keys that overrides set to None.
_none_overrides: list[str] = []


def _without_none_overrides(argv: list[str]) -> list[str]:
  """Removes --config.KEY=None of keys that accept None, which `_config_values` sets.

  ml_collections converts a value to the type of the value in the configuration file, so that it
  does not accept None for a key that the file sets.
  """
  optional = {f'config.{p}': p for p, key in config_lib.leaves() if type(None) in key.types}
  _none_overrides.clear()
  kept = []
  for argument in argv:
    name, _, value = argument.lstrip('-').partition('=')
    if value != 'None' or not argument.startswith('-') or not name.startswith('config.'):
      kept.append(argument)
    elif name in optional:
      _none_overrides.append(optional[name])
    else:
      raise errors.ConfigError(_unknown_override(['', argument]) or f'{name} cannot be None')
  return kept


def _config_values() -> ml_collections.ConfigDict:
  """Returns the ConfigDict of --config with its overrides."""
  if _CONFIG.value is None:
    raise errors.ConfigError(_NO_CONFIG)
  try:
    values = _CONFIG.value.unlock()
  except OSError as error:  # ml_collections reports a missing file on the first access.
    file = config_flags.get_config_filename(flags.FLAGS['config'])
    reason = error.strerror or str(error).rpartition('[Errno')[2].partition('] ')[2] or error
    raise errors.ConfigError(f'cannot read the --config file {file}: {reason}') from error
  values.update_from_flattened_dict(dict.fromkeys(_none_overrides))
  return values


def _unknown_override(argv: list[str]) -> str | None:
  """Returns the error message for the first override of an unknown key."""
  known = {f'config.{path}' for path, _ in config_lib.leaves()}
  for argument in argv[1:]:
    name = argument.lstrip('-').partition('=')[0]
    if name.startswith('config.') and name not in known:
      return config_lib.unknown_key(name.removeprefix('config.'))
  return None


def _print_help() -> None:
  try:
    print(config_lib.describe(), flush=True)
  except BrokenPipeError:  # The reader, for example `head`, has closed the pipe.
    # Python flushes stdout again when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(error: errors.UserError) -> None:
  # The flag has no value if the flags could not be parsed.
  if '--debug' in sys.argv or (flags.FLAGS.is_parsed() and _DEBUG.value):
    traceback.print_exception(error)
  terminal.print_error(error)


if __name__ == '__main__':
  run()
