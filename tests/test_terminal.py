"""Log lines, results and progress bars."""

import logging
import pathlib
import re

import jax
import pytest
from absl import flags
from absl import logging as absl_logging

from farmer_jax import terminal

INFO, WARNING = logging.INFO, logging.WARNING
PACKAGE = pathlib.Path(terminal.__file__).parent


@pytest.fixture(autouse=True)
def _restored_logging():
  jax.devices()  # JAX logs while it initializes its devices.
  root, absl_logger = logging.getLogger(), absl_logging.get_absl_logger()
  before = list(root.handlers), root.level, absl_logger.level
  yield
  root.handlers[:], level, absl_level = before
  root.setLevel(level)
  absl_logger.setLevel(absl_level)
  flags.FLAGS['verbosity'].unparse()


def log(level, package='farmer_jax', logger='absl'):
  """Logs 'message' from a file of `package`, at a level that the logger does not discard."""
  file = PACKAGE.parent / package / 'file.py'
  target = logging.getLogger(logger)
  if target.isEnabledFor(level):
    target.handle(logging.LogRecord(logger, level, str(file), 1, 'message', None, None))


@pytest.mark.parametrize('process', [0, 1])
@pytest.mark.parametrize(
  ('level', 'package', 'logger', 'printed'),
  [
    (INFO, 'farmer_jax', 'absl', 'message\n'),
    (INFO, 'orbax', 'absl', ''),
    (INFO, 'jax', 'jax._src.dispatch', ''),
    (WARNING, 'farmer_jax', 'absl', 'WARNING: message\n'),
    (WARNING, 'jax', 'jax._src.dispatch', 'WARNING: message\n'),
    (logging.ERROR, 'grain', 'absl', 'ERROR: message\n'),
  ],
)
def test_log_lines(monkeypatch, capsys, process, level, package, logger, printed):
  """INFO lines of this package come from process 0, warnings from every process and package."""
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  terminal.configure_logging()
  terminal.configure_logging()  # The second call adds no second handler.
  log(level, package, logger)
  expected = '' if process and level == INFO else printed
  assert capsys.readouterr() == ('', expected)


@pytest.mark.parametrize(
  ('verbosity', 'level', 'printed'),
  [(0, INFO, 'message\n'), (-1, INFO, ''), (-1, WARNING, 'WARNING: message\n'), (-2, WARNING, '')],
)
@pytest.mark.parametrize('package', ['farmer_jax', 'orbax'])
def test_verbosity_applies_to_all_packages(capsys, verbosity, level, printed, package):
  absl_logging.use_absl_handler()
  flags.FLAGS['verbosity'].parse(str(verbosity))
  terminal.configure_logging()
  log(level, package)
  assert capsys.readouterr() == ('', printed)


def test_results_are_on_stdout_of_process_zero(monkeypatch, capsys):
  terminal.print_result('3.98 bits/dim')
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  terminal.print_result('3.98 bits/dim')
  assert capsys.readouterr() == ('3.98 bits/dim\n', '')


@pytest.mark.parametrize('process', [0, 1])
def test_progress_bar_prints_lines_in_process_zero(monkeypatch, capsys, process):
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  with terminal.progress_bar('training', 'step', 10, initial=4) as bar:
    bar.update(6)
  out, err = capsys.readouterr()
  assert out == '' and '\r' not in err
  if process:
    assert err == ''
  else:
    assert re.search('^.*training.*4/10', err, re.MULTILINE) and '10/10' in err


def test_output_to_a_pipe_is_whole_lines_in_order(capsys):
  """Messages are not behind or inside the text of a progress bar, also with two bars."""
  terminal.configure_logging()
  with (
    terminal.progress_bar('training', 'step', 10) as outer,
    terminal.progress_bar('samples', 'image', 4) as inner,
  ):
    log(INFO)
    outer.update(3)
    outer.refresh()
    log(WARNING)
    inner.update(2)
    inner.refresh()
    log(INFO)
  _, err = capsys.readouterr()
  assert '\r' not in err and '\x1b' not in err and err.endswith('\n')
  found = [re.sub(r'(\w+):.*?(\d+/\d+) .*', r'\1 \2', line) for line in err.splitlines()]
  bars = ['samples 2/4', 'training 3/10']  # the last lines, when the bars close
  expected = ['training 0/10', 'samples 0/4', 'message', 'training 3/10', 'WARNING: message']
  assert found == [*expected, 'samples 2/4', 'message', *bars]


def test_results_and_log_lines_share_a_pipe_in_order(monkeypatch, tmp_path):
  """A pipe of both streams does not show the results of the job at its end."""
  terminal.configure_logging()
  with open(tmp_path / 'pipe', 'a') as out, open(tmp_path / 'pipe', 'a', buffering=1) as err:
    monkeypatch.setattr('sys.stdout', out)
    monkeypatch.setattr('sys.stderr', err)
    terminal.print_result('first')
    log(WARNING)
    terminal.print_status('third')
  assert (tmp_path / 'pipe').read_text() == 'first\nWARNING: message\nthird\n'
