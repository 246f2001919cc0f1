"""The command line: `python -m farmer_jax.main --config=configs/quickstart.py`."""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from farmer_jax import config as config_lib
from farmer_jax import errors

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Configuration file, for example configs/quickstart.py; overrides follow it, as in'
  ' --config.train.steps=100.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder of the run: results go there, and a run found there goes on. Default: runs/<name>, with'
  ' the name from the configuration.',
)
_JOB = flags.DEFINE_string('job', None, 'What to do; default: the job of the configuration.')
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'Run one job in several processes, of which this is one; the environment says who they are (TPU'
  ' pods, SLURM, Open MPI, Kubernetes).',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'The same where it does not: host:port of the first process.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')
_CONFIG_HELP = flags.DEFINE_bool('config_help', False, 'List all keys of the configuration.')


def main(argv):
  """Runs the job that the configuration names."""
  if _CONFIG_HELP.value:
    print(config_lib.describe())
    return
  if len(argv) > 1:
    raise errors.ConfigError(f'unexpected argument {argv[1]!r}; options start with --')
  values = _config_values()
  if _JOB.value:
    values.job = _JOB.value
  config = config_lib.from_config_dict(values)
  config_lib.check(config)
  # Imported here: the command line answers before JAX has loaded.
  import jax

  from farmer_jax import jobs
  from farmer_jax.distributed import preemption, processes

  given = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if _DISTRIBUTED.value or any(value is not None for value in given):
    processes.start(*given)
  try:
    jobs.run(config, _WORKDIR.value or f'runs/{config.name}')
  except preemption.Preempted as notice:
    print(notice, file=sys.stderr)
    sys.exit(preemption.START_AGAIN)
  except errors.ConfigError as error:
    if jax.process_count() == 1:
      raise
    # The others may be waiting for this one: leaving in good order would wait for them.
    _say(error)
    os._exit(1)


def _config_values():
  """The ConfigDict that --config and its overrides make."""
  if _CONFIG.value is None:
    raise errors.ConfigError('no --config given, for example --config=configs/quickstart.py')
  try:
    return _CONFIG.value.unlock()
  except OSError as error:  # The library remembers that the file could not be read until here.
    reason = ' '.join(str(error).split()).partition('Attempted ')[2] or error
    raise errors.ConfigError(f'cannot read the --config file: {reason}') from error


def _parse_flags(argv):
  """Parses flags; what is wrong with them is reported like any other mistake of the user's."""
  try:
    return flags.FLAGS(argv)
  except errors.ConfigError:
    raise
  except (AttributeError, KeyError, flags.Error, OSError, TypeError, ValueError) as error:
    message = _own_mistake(error) or _unknown_override(argv) or ' '.join(str(error).split())
    raise errors.ConfigError(message) from error


def _own_mistake(error):
  """The message of the `ConfigError` that a config file raised, or None: the library puts a whole
  traceback in its place."""
  message = None
  while error is not None:
    if isinstance(error, errors.ConfigError):
      message = str(error)
    error = error.__cause__ or error.__context__
  return message


def _unknown_override(argv):
  """The message about the first override of a key that does not exist, or None."""
  known = {path for path, _ in config_lib.leaves()}
  for argument in argv[1:]:
    if argument.lstrip('-').startswith('config.'):
      path = argument.lstrip('-').removeprefix('config.').partition('=')[0]
      if path not in known:
        return config_lib.unknown_key(path)
  return None


def run():
  """Entry point: mistakes of the user's end with one line on standard error and exit code 1."""
  # The libraries report every file they touch; --verbosity=0 brings that back.
  logging.set_verbosity(logging.WARNING)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  try:
    app.run(main, flags_parser=_parse_flags)
  except errors.ConfigError as error:
    _say(error)
    sys.exit(1)


def _say(error):
  print(f'error: {error}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  run()
