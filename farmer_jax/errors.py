"""Errors that a user can act on. Their messages are one line and say what to change.

`main` prints the message of a `UserError` and exits with code 1; `--debug` shows the traceback too.
Any other exception is a defect of this program.
"""


class UserError(Exception):
  """Something outside this program has to change: a setting, a file, a machine."""


class ConfigError(UserError, ValueError):
  """A setting that cannot work, alone or together with others; names the key."""


class DataError(UserError):
  """Images, labels or files of others that cannot be used; names the file or the record."""


class WorkdirError(UserError):
  """A workdir that is missing, belongs to another run, is in use or cannot be written to."""


class CheckpointError(UserError):
  """A checkpoint that is missing, damaged, of another model, or could not be written."""


class DivergenceError(UserError):
  """Training that does not recover from unusable updates."""


class ProcessError(UserError):
  """Processes of one job that cannot work together."""
