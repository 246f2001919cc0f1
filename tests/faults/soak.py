"""A training run that is killed 200 times: `make soak`.

    python -m tests.faults.soak --kills 200

Trains once without interruption, and once with SIGKILL at random times: during the start, during a
restore, during steps and asynchronous saves. Then compares parameters, optimizer state, iterator
state and metrics bit for bit. If the soak test is interrupted, the same command resumes it. Prints
a line every ten kills and a summary. The exit code is 0 only if both runs are equal.
"""

import argparse
import collections
import json
import pathlib
import random
import time

from tests.support import processes

# The run saves about one checkpoint per second.
SETTINGS = ['train.checkpoint_every=40', 'train.log_every=10', 'train.validate_every=2000']
TIMEOUT = 7200


def train(workdir):
  settings = [*SETTINGS, f'train.steps={processes.STEPS}']
  return processes.train(workdir, *settings, devices=1, fault=('no_tensorboard',))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=200)
  parser.add_argument('--steps', type=int, default=40_000)
  arguments = parser.parse_args()
  folder = pathlib.Path('runs/soak').absolute()
  folder.mkdir(parents=True, exist_ok=True)
  processes.STEPS = arguments.steps
  uninterrupted, killed = folder / 'uninterrupted', folder / 'killed'
  start = time.monotonic()
  train(uninterrupted).finish(TIMEOUT)
  print(f'Without interruption: {time.monotonic() - start:.0f} s', flush=True)
  start = time.monotonic()
  kills = kill_repeatedly(killed, arguments.kills, folder / 'kills.json')
  log = train(killed).finish(TIMEOUT).log()
  minutes = (time.monotonic() - start) / 60
  processes.assert_equal(uninterrupted, killed)
  print(
    f'{sum(kills.values())} kills ({", ".join(f"{n} {when}" for when, n in kills.items())}) in'
    f' {minutes:.0f} minutes; {log.count("incomplete checkpoint")} incomplete checkpoints deleted;'
    f' {len(processes.records(killed))} lines of metrics and the state after {processes.STEPS}'
    ' steps are bit-equal'
  )


def kill_repeatedly(workdir, total, file):
  """Starts and kills the run. Returns {phase: number of kills}, which is also saved in `file`."""
  kills = collections.Counter(json.loads(file.read_text()) if file.exists() else {})
  rng = random.Random(sum(kills.values()))
  while sum(kills.values()) < total:
    first_step = last_step(workdir)
    job = train(workdir)
    if rng.random() < 0.2:
      time.sleep(rng.uniform(0, 8))
    else:
      job.wait_for(lambda first_step=first_step: last_step(workdir) > first_step, TIMEOUT)
      time.sleep(rng.uniform(0, 2))
    if job.processes[0].poll() is not None:
      raise SystemExit(f'The run ended before the last kill; raise --steps.\n{job.log()[-2000:]}')
    kills['during training' if last_step(workdir) > first_step else 'before the first step'] += 1
    job.kill()
    file.write_text(json.dumps(kills))
    if sum(kills.values()) % 10 == 0:
      print(f'{sum(kills.values())} kills, at step {last_step(workdir)}', flush=True)
  return kills


def last_step(workdir):
  """Returns the last step in the metrics, or 0."""
  path = workdir / 'metrics.jsonl'
  # The last line may be incomplete.
  lines = path.read_text()[-4000:].split('\n')[1:-1] if path.exists() else ()
  return json.loads(lines[-1])['step'] if lines else 0


if __name__ == '__main__':
  main()
