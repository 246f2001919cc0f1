"""Output to the terminal. Results go to stdout. Log lines, errors and progress go to stderr."""

import contextlib
import io
import logging
import os
import pathlib
import sys
from typing import Any

import tqdm
from absl import flags
from absl import logging as absl_logging

_PACKAGE = pathlib.Path(__file__).parent


def configure_logging() -> None:
  """Makes `absl.logging` print plain lines on stderr, above a progress bar.

  It prints warnings and errors of all packages and processes, and INFO lines of this package from
  process 0, whose index initializes JAX. The level of `--verbosity` applies to all packages.
  """
  root, handler = logging.getLogger(), _TerminalHandler()
  for installed in list(root.handlers):
    if isinstance(installed, (absl_logging.ABSLHandler, _TerminalHandler)):
      root.removeHandler(installed)
  root.addHandler(handler)
  if flags.FLAGS['verbosity'].present:
    handler.shows_all_packages = True
  else:
    root.setLevel(logging.WARNING)
    absl_logging.get_absl_logger().setLevel(logging.INFO)


def protect_streams() -> None:
  """Makes output that cannot be written harmless: a job must not end because a terminal is closed.

  Characters that the encoding of a stream lacks are replaced by question marks.
  """
  for name in ('stdout', 'stderr'):
    # The stream is None if the descriptor is closed.
    stream = getattr(sys, name) or open(os.devnull, 'w')  # noqa: SIM115
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='replace')
    setattr(sys, name, _ProtectedStream(stream))


def print_result(text: str) -> None:
  """Prints a result on stdout, in process 0."""
  if _is_process_zero():
    tqdm.tqdm.write(text)
    sys.stdout.flush()  # A pipe of both streams has all lines in order.


def print_status(text: str) -> None:
  """Prints a line on stderr, in any process. Can be used before JAX is initialized."""
  tqdm.tqdm.write(text, file=sys.stderr)
  sys.stderr.flush()


def print_error(error: Exception) -> None:
  """Prints `error: …` on stderr, in any process."""
  print_status(f'error: {error}')


def progress_bar(
  description: str, unit: str, total: int, initial: int = 0, delay: float = 0
) -> tqdm.tqdm:
  """Returns a progress bar, which is a context manager. Process 0 shows it on stderr.

  If stderr is not a terminal, the bar prints a line every 15 seconds. `unit` is a singular noun, of
  which an earlier process completed `initial`. The bar appears after `delay` seconds.
  """
  interactive = sys.stderr.isatty()
  return tqdm.tqdm(
    desc=description,
    unit=unit,
    total=total,
    initial=initial,
    delay=delay,
    disable=not _is_process_zero(),
    dynamic_ncols=interactive,
    ncols=None if interactive else 100,
    mininterval=0.2 if interactive else 15,
    file=sys.stderr if interactive else _LineStream(),
  )


class _TerminalHandler(logging.Handler):
  """Writes log records above a progress bar."""

  def __init__(self) -> None:
    super().__init__()
    self.shows_all_packages = False
    self.addFilter(self._is_shown)

  def _is_shown(self, record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING:
      return True
    if pathlib.Path(record.pathname).is_relative_to(_PACKAGE):
      return _is_process_zero()
    # JAX logs while it initializes devices. The process index is not available at that time.
    return self.shows_all_packages

  def emit(self, record: logging.LogRecord) -> None:
    # Handlers of the standard library also pass exceptions to `handleError`.
    try:
      prefix = f'{record.levelname}: ' if record.levelno >= logging.WARNING else ''
      tqdm.tqdm.write(prefix + self.format(record), file=sys.stderr)
    except Exception:
      self.handleError(record)


class _ProtectedStream:
  """A text stream that ignores errors of the operating system."""

  def __init__(self, stream: Any) -> None:
    self._stream = stream

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError):
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError):
      self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


class _LineStream:
  """Writes the updates of a progress bar to stderr as whole lines."""

  def write(self, text: str) -> None:
    # tqdm returns to the start of the line, moves the cursor, and overwrites text with spaces.
    if line := text.replace('\x1b[A', '').strip():
      sys.stderr.write(f'{line}\n')

  def flush(self) -> None:
    sys.stderr.flush()


def _is_process_zero() -> bool:
  import jax  # Imported here, because `main` reports errors in flags before it imports JAX.

  return jax.process_index() == 0
