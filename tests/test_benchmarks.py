"""Benchmarks: what they measure, and that those of accelerators run with tiny models."""

import json
import subprocess
import sys
import time

import pytest
from absl.testing import flagsaver

from benchmarks import shared_flags, timing
from tests.support import processes


@pytest.mark.parametrize('processor_time', [False, True])
def test_only_elapsed_time_contains_waiting(processor_time):
  with flagsaver.as_parsed(processor_time=str(processor_time)):
    clock = shared_flags.clock()
  seconds = timing.medians({'wait': lambda: time.sleep(0.2)}, 3, clock)['wait']
  assert seconds < 0.1 if processor_time else seconds >= 0.2


@pytest.mark.slow
def test_benchmark_of_an_accelerator(tmp_path):
  file = tmp_path / 'rows.json'
  command = [sys.executable, '-m', 'benchmarks.accelerator', '--tiny', f'--out={file}']
  subprocess.run([*command, '--repeats=1'], check=True, env=processes.environment(devices=1))
  rows = json.loads(file.read_text())['rows']
  assert not [row for row in rows if 'error' in row]
  # Four rows of attention, five of training, seven of sampling for two types and two batch sizes.
  assert len(rows) == 4 + 5 + 4 * 7
  exact = [row for row in rows if 'inverse' in row['measurement'] and row['variant'] == 'float32']
  assert exact and all(row['largest difference'] < 1e-3 for row in exact)
