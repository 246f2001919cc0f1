"""The benchmark of accelerators runs with tiny models, so that no device time is lost."""

import json
import subprocess
import sys

import pytest

from tests.support import processes


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
