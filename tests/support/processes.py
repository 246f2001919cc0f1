"""Runs of the command line in processes of their own: started, killed, compared."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8
SETTINGS = (
  'model.patch_size=4 model.flow.blocks=2 model.flow.layers=1 model.flow.width=16'
  ' model.flow.head_dim=8 model.prior.layers=1 model.prior.width=16 model.prior.head_dim=8'
  ' model.prior.condition_copies=2 model.prior.components=4 model.prior.informative_channels=4'
  ' model.prior.redundant_components=4 data.flip=True'
  f' train.steps={STEPS} train.batch_size=16 train.accumulate=1 train.log_every=1'
  ' train.validate_every=4 train.valid_batch_size=50 train.sample_every=0 train.checkpoint_every=2'
  ' train.keep_checkpoints=4 train.ema_decay=0.9 train.optimizer.learning_rate=0.001'
).split()


def start(workdir, *arguments, devices=2, processes=1, before=None):
  """Starts the command of the README in each of several processes, after a line of Python."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = os.environ | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'JAX_PLATFORMS': 'cpu',
  }
  started = []
  for process in range(processes):
    program = ['-m', 'farmer_jax.main']
    if before:
      program = ['-c', f'{before}\nfrom farmer_jax import main; main.run()']
    command = [sys.executable, *program, f'--workdir={workdir}', *arguments]
    if processes > 1:
      command += [f'--coordinator=localhost:{port}', f'--num_processes={processes}']
      command += [f'--process_id={process}']
    with pathlib.Path(f'{workdir}-{process}.log').open('ab') as log:
      started.append(
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
      )
  return started


def finish(started, workdir):
  for number, process in enumerate(started):
    code = process.wait(timeout=400)
    assert code == 0, pathlib.Path(f'{workdir}-{number}.log').read_text()[-3000:]


def train(workdir, *more, **how):
  arguments = ['--config=configs/quickstart.py', *(f'--config.{s}' for s in (*SETTINGS, *more))]
  return start(workdir, *arguments, **how)


def records(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def state(workdir):
  """The last checkpoint, whatever devices it was written by."""
  path = workdir / 'checkpoints' / str(STEPS) / 'state'
  with ocp.PyTreeCheckpointer() as reader:
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    tree = reader.metadata(path).item_metadata.tree
    state = reader.restore(path, restore_args=jax.tree.map(lambda _: as_numpy, tree))
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def assert_alike(one, other):
  """The same metrics at the same steps, and the same state, but for rounding on another mesh."""
  assert [(r['step'], r['split']) for r in records(one)] == [
    (r['step'], r['split']) for r in records(other)
  ]
  for a, b in zip(records(one), records(other), strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-4)
  for (path, a), b in zip(state(one).items(), state(other).values(), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4, err_msg=path)


CLOCK = ('time', 'step_seconds', 'images_per_second', 'input_wait_seconds')


def timeless(workdir):
  return [{k: v for k, v in r.items() if k not in CLOCK} for r in records(workdir)]


def position(workdir):
  path = workdir / 'checkpoints' / str(STEPS) / 'dataset' / 'metadata'
  return json.loads(path.read_text())


def assert_equal(one, other):
  """Parameters, optimizer, place in the data and metrics, exactly."""
  first, second = state(one), state(other)
  assert first.keys() == second.keys()
  assert any('params' in path for path in first) and any('opt_state' in path for path in first)
  for path, leaf in first.items():
    np.testing.assert_array_equal(leaf, second[path], err_msg=path)
  assert position(one) == position(other)
  assert timeless(one) == timeless(other)


def log(workdir, process=0):
  return pathlib.Path(f'{workdir}-{process}.log').read_text()


def wait_for(started, workdir, happened, seconds=300):
  """Waits until happened() is true; the processes must not end meanwhile."""
  deadline = time.monotonic() + seconds
  while not happened():
    assert time.monotonic() < deadline, log(workdir)[-3000:]
    assert all(process.poll() is None for process in started), log(workdir)[-3000:]
    time.sleep(0.02)


def kill(started):
  for process in started:
    process.send_signal(signal.SIGKILL)
    process.wait()
