"""Output to the terminal. Results go to stdout. Log lines, errors and progress go to stderr."""

import logging
import pathlib
import sys

import tqdm
from absl import flags
from absl import logging as absl_logging

_PACKAGE = pathlib.Path(__file__).parent


def configure_logging() -> None:
  """Makes `absl.logging` print plain lines on stderr, above a progress bar.

  The handler prints warnings and errors of all packages and processes, and INFO lines of this
  package from process 0. With `--verbosity`, the level of this flag applies to all packages. To
  print an INFO line of this package, the handler reads the process index, which initializes JAX.
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


def print_result(text: str) -> None:
  """Prints a result on stdout, in process 0."""
  if _is_process_zero():
    tqdm.tqdm.write(text)


def print_error(error: Exception) -> None:
  """Prints `error: …` on stderr, in any process."""
  tqdm.tqdm.write(f'error: {error}', file=sys.stderr)
  sys.stderr.flush()


def progress_bar(
  description: str, unit: str, total: int, initial: int = 0, delay: float = 0
) -> tqdm.tqdm:
  """Returns a progress bar, which is a context manager. Process 0 shows it on stderr.

  If stderr is not a terminal, the bar prints a line every 15 seconds. `unit` is a singular noun.
  `initial` is the number of units that an earlier process completed. The bar appears after `delay`
  seconds.
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


class _LineStream:
  """Writes to stderr for a progress bar outside a terminal, one line per update."""

  def write(self, text: str) -> None:
    sys.stderr.write(text.replace('\r', '\n'))

  def flush(self) -> None:
    sys.stderr.flush()


def _is_process_zero() -> bool:
  import jax  # Imported here, because `main` reports errors in flags before it imports JAX.

  return jax.process_index() == 0
