"""Errors that a user can correct. Each message is one line and names the correction.

`main` prints the message of a `UserError` and exits with code 1. With `--debug` it also prints the
traceback. Any other exception is a bug.
"""


class UserError(Exception):
  """The job cannot run until a setting, a file or a machine changes."""


class ConfigError(UserError, ValueError):
  """A setting is invalid, individually or in combination. The message names the key."""


class DataError(UserError):
  """Images, labels or other input files are unusable. The message names the file or record."""


class WorkdirError(UserError):
  """A workdir is missing, belongs to another run, is in use, or is not writable."""


class CheckpointError(UserError):
  """A checkpoint is missing, corrupt, from another model, or could not be written."""


class DivergenceError(UserError):
  """Training does not recover from skipped updates."""


class ProcessError(UserError):
  """The processes of a job cannot work together."""
