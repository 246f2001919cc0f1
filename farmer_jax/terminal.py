"""What a run says to the person in front of it."""

import sys

import jax
import tqdm


def say(message):
  """Writes a line to standard error, above a progress bar if there is one. Of several processes the
  first alone does, here and below."""
  if not jax.process_index():
    tqdm.tqdm.write(message, file=sys.stderr)


def tell(message):
  """Writes a result to standard output."""
  if not jax.process_index():
    print(message)


def progress(what, unit, total, done=0):
  """A progress bar on standard error, with speed and time left; on a log file, a line now and
  then."""
  interactive = sys.stderr.isatty()
  return tqdm.tqdm(
    desc=what,
    unit=unit,
    total=total,
    initial=done,
    disable=jax.process_index() > 0,
    dynamic_ncols=interactive,
    ncols=None if interactive else 100,
    mininterval=0.2 if interactive else 15,
    file=sys.stderr if interactive else _Lines(),
  )


class _Lines:
  """Standard error for a progress bar that is not on a terminal: each state gets a line of its
  own."""

  def write(self, text):
    sys.stderr.write(text.replace('\r', '\n'))

  def flush(self):
    sys.stderr.flush()
