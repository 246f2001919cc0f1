"""Errors that a user can correct. Each message is one line and names the correction.

`main` prints the message of a `UserError` and exits with code 1. With `--debug` it also prints the
traceback. Any other exception except `preemption.Preempted` is a bug.
"""

# EX_TEMPFAIL of sysexits.h. The progress is saved, and the same command resumes the job.
EXIT_CODE_PREEMPTED = 75


def reason(error: BaseException) -> str:
  """Returns the message of an exception in one line of at most 200 characters, or its type."""
  return ' '.join(str(error).split())[:200] or type(error).__name__


class UserError(Exception):
  """The job cannot run until a setting, a file or a machine changes."""


class ConfigError(UserError, ValueError):
  """A setting or a combination of settings is invalid. The message names the key."""


class DataError(UserError):
  """Images, labels or other inputs are unusable. The message names the file, record or array."""


class WorkdirError(UserError):
  """A workdir is missing, belongs to another run, is in use, or is not writable."""


class CheckpointError(UserError):
  """A checkpoint is missing, corrupt, from another model, or could not be written."""


class DivergenceError(UserError):
  """Training diverged again after the allowed number of rollbacks."""


class OutOfMemoryError(UserError):
  """A device or the host has too little memory. The message names the settings that take less."""


class ProcessError(UserError):
  """The processes of a job cannot work together."""
