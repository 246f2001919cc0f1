"""Runs the command line in the test process, with a replacement for the job."""

import pathlib
import sys
from typing import Any, NamedTuple
from unittest import mock

import pytest
from absl import flags

from farmer_jax import config, jobs, main

ROOT = pathlib.Path(__file__).parents[2]


class Outcome(NamedTuple):
  """Result of a command. `jobs` contains the arguments of each call of `jobs.run`."""

  code: int
  out: str
  err: str
  jobs: list[tuple[config.Config, str]]


def run(
  arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, job: Any = None
) -> Outcome:
  """Runs `python -m farmer_jax.main` from the root of the repository, with `job` as `jobs.run`.

  The working directory changes until the scope of `monkeypatch` ends.
  """
  job = mock.Mock(wraps=job)
  monkeypatch.setattr(jobs, 'run', job)
  monkeypatch.setattr(sys, 'argv', ['main', *arguments])
  monkeypatch.chdir(ROOT)
  flags.FLAGS.unparse_flags()
  for name in list(flags.FLAGS):
    if name.startswith('config.'):  # Overrides of an earlier command define these flags.
      delattr(flags.FLAGS, name)
    else:
      flags.FLAGS[name].unparse()
  try:
    main.run()
    code = 0
  except SystemExit as exit_:
    code = int(exit_.code or 0)
  return Outcome(code, *capsys.readouterr(), [call.args for call in job.call_args_list])


def assert_user_error(outcome: Outcome) -> None:
  """Asserts exit code 1, one line on stderr, and no job."""
  assert outcome.code == 1
  assert not outcome.out and not outcome.jobs
  assert outcome.err.startswith('error: ')
  assert len(outcome.err.splitlines()) == 1, outcome.err
