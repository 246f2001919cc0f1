"""A training run that is killed again and again: `make soak`.

    python tests/faults/soak.py --kills 200

Trains once without interruption and once with SIGKILL at random moments: while Python loads, while
a checkpoint is read, in the midst of steps and of asynchronous saves. Then compares parameters,
optimizer, place in the data and metrics, bit for bit. The folder stays; the same command goes on
after the last kill. Prints a line every ten kills and figures at the end; exit code 0 only if the
two runs are equal.
"""

import argparse
import collections
import json
import pathlib
import random
import re
import subprocess
import time

from tests.support import processes

# Small steps, and a checkpoint about every second.
# Without TensorBoard: TensorFlow takes longer to load than everything else together.
QUICK = {'devices': 1, 'before': "import sys; sys.modules['clu.metric_writers'] = None"}
SETTINGS = ['train.checkpoint_every=40', 'train.log_every=10', 'train.validate_every=2000']


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=200)
  parser.add_argument('--steps', type=int, default=40_000)
  parser.add_argument('--folder', type=pathlib.Path, default=pathlib.Path('runs/soak'))
  arguments = parser.parse_args()
  folder = arguments.folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  processes.STEPS = arguments.steps
  settings = [*SETTINGS, f'train.steps={arguments.steps}']
  whole, killed = folder / 'whole', folder / 'killed'
  start = time.monotonic()
  finish(processes.train(whole, *settings, **QUICK), whole)
  print(f'Without interruption: {time.monotonic() - start:.0f} s', flush=True)
  start = time.monotonic()
  when = kill_often(killed, settings, arguments.kills, folder / 'kills.json')
  finish(processes.train(killed, *settings, **QUICK), killed)
  minutes = (time.monotonic() - start) / 60
  processes.assert_equal(whole, killed)
  moments = ', '.join(f'{number} {name}' for name, number in when.items())
  unfinished = processes.log(killed).count('was never finished')
  print(
    f'{sum(when.values())} kills ({moments}), this time over {minutes:.0f} minutes; {unfinished}'
    f' unfinished checkpoints found; {len(processes.timeless(killed))} lines of metrics and the'
    f' state after {arguments.steps} steps are equal, bit for bit'
  )


def kill_often(workdir, settings, kills, file):
  """Starts and kills the run; {when: number of kills}, kept in a file."""
  when = collections.Counter(json.loads(file.read_text()) if file.exists() else {})
  rng = random.Random(sum(when.values()))
  while sum(when.values()) < kills:
    known = step_of(workdir)
    (process,) = processes.train(workdir, *settings, **QUICK)
    if rng.random() < 0.2:
      time.sleep(rng.uniform(0, 8))
    else:
      while process.poll() is None and step_of(workdir) <= known:
        time.sleep(0.05)
      time.sleep(rng.uniform(0, 2))
    if process.poll() is not None:
      raise SystemExit(f'The run ended too early: more --steps.\n{processes.log(workdir)[-2000:]}')
    when['in training' if step_of(workdir) > known else 'before'] += 1
    processes.kill([process])
    file.write_text(json.dumps(when))
    if sum(when.values()) % 10 == 0:
      print(f'{sum(when.values())} kills, at step {step_of(workdir)}', flush=True)
  return when


def step_of(workdir):
  """The last step in the metrics, or 0."""
  path = workdir / 'metrics.jsonl'
  steps = re.findall(r'"step": (\d+)', path.read_text()[-4000:]) if path.exists() else ()
  return int(steps[-1]) if steps else 0


def finish(started, workdir):
  (process,) = started
  try:
    code = process.wait(timeout=7200)
  except subprocess.TimeoutExpired:
    code = 'none after two hours'
  assert code == 0, processes.log(workdir)[-3000:]


if __name__ == '__main__':
  main()
