"""What a run says to the person in front of it."""

import sys

import tqdm


def say(message):
  """Writes a line to standard error, above a progress bar if there is one."""
  tqdm.tqdm.write(message, file=sys.stderr)
