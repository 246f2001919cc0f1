"""Starts the command line in separate processes, kills them, and compares their results."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = 'tests.support.programs'
STEPS = 8
SETTINGS = (
  'model.patch_size=4 model.flow.blocks=2 model.flow.layers=1 model.flow.width=16'
  ' model.flow.head_dim=8 model.prior.layers=1 model.prior.width=16 model.prior.head_dim=8'
  ' model.prior.condition_copies=2 model.prior.components=4 model.prior.informative_channels=4'
  ' model.prior.redundant_components=4 data.flip=True'
  f' train.steps={STEPS} train.batch_size=16 train.accumulation_steps=1 train.log_every=1'
  ' train.validate_every=4 train.valid_batch_size=50 train.sample_every=0 train.checkpoint_every=2'
  ' train.keep_checkpoints=4 train.ema_decay=0.9 train.optimizer.learning_rate=0.001'
).split()
# Metrics that measure time.
TIMES = {'time', 'step_seconds', 'images_per_second', 'input_wait_seconds'}


def environment(devices):
  """Returns the environment of a process with `devices` virtual CPU devices."""
  flags = os.environ.get('XLA_FLAGS', ''), f'--xla_force_host_platform_device_count={devices}'
  return os.environ | {'XLA_FLAGS': ' '.join(flags), 'JAX_PLATFORMS': 'cpu'}


def run_program(name, *arguments, devices=1):
  """Runs tests/support/programs/NAME.py. Returns its standard output."""
  command = [sys.executable, '-m', f'{PROGRAMS}.{name}', *map(str, arguments)]
  done = subprocess.run(command, cwd=ROOT, env=environment(devices), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


class Job:
  """The command line in one or several processes.

  Args:
    workdir: the workdir.
    *arguments: arguments of the command line.
    devices: virtual CPU devices of each process.
    processes: the number of processes.
    fault: the name and the arguments of a fault of programs/faulty_main.py.
    module: the module to start instead of farmer_jax.main.
    logs: standard output and error of process i are appended to LOGS-i.log. Default: the workdir.
  """

  def __init__(
    self, workdir, *arguments, devices=2, processes=1, fault=(), module='farmer_jax.main', logs=None
  ):
    if fault:
      module = f'{PROGRAMS}.faulty_main'
      arguments = f'{fault[0]}={",".join(map(str, fault[1:]))}', *arguments
    command = [sys.executable, '-m', module, *arguments, f'--workdir={workdir}']
    with socket.socket() as unused:
      unused.bind(('localhost', 0))
      address = f'--coordinator=localhost:{unused.getsockname()[1]}'
    self.logs = [pathlib.Path(f'{logs or workdir}-{i}.log') for i in range(processes)]
    self.processes = []
    for i, log in enumerate(self.logs):
      several = [address, f'--num_processes={processes}', f'--process_id={i}']
      own = [*command, *(several if processes > 1 else [])]
      with log.open('ab') as file:
        how = dict(cwd=ROOT, env=environment(devices), stdout=file, stderr=subprocess.STDOUT)
        self.processes.append(subprocess.Popen(own, **how))

  def log(self, process=0):
    return self.logs[process].read_text()

  def codes(self, timeout=400):
    """Waits for all processes. Returns their exit codes."""
    return [process.wait(timeout=timeout) for process in self.processes]

  def finish(self, timeout=400):
    """Waits until all processes have succeeded."""
    codes = self.codes(timeout)
    assert not any(codes), [log.read_text()[-3000:] for log in self.logs]
    return self

  def wait_for(self, condition, seconds=300):
    """Waits until condition() is true. Fails if a process ends earlier."""
    deadline = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < deadline, self.log()[-3000:]
      assert all(process.poll() is None for process in self.processes), self.log()[-3000:]
      time.sleep(0.05)

  def kill(self):
    for process in self.processes:
      process.kill()
      process.wait()


def train(workdir, *overrides, **how):
  """Starts a small training run. `how` contains keyword arguments of `Job`."""
  keys = [f'--config.{override}' for override in (*SETTINGS, *overrides)]
  return Job(workdir, '--config=configs/quickstart.py', *keys, **how)


def start_job(name, workdir, *overrides, **how):
  """Starts a job of a trained run in its workdir. `how` contains keyword arguments of `Job`."""
  keys = [f'--config.{override}' for override in overrides]
  return Job(workdir, f'--job={name}', f'--config=configs/from_run.py:{workdir}', *keys, **how)


def records(workdir):
  """Returns the records in metrics.jsonl, or an empty list if there is no file."""
  path = workdir / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def resumed_step(before, workdir):
  """Returns the last step whose record in `before` is unchanged after the run has resumed."""
  after = records(workdir)
  return max((record['step'] for record in before if record in after), default=0)


def last_checkpoint(workdir):
  return workdir / 'checkpoints' / str(STEPS)


def final_state(workdir):
  """Returns {path: array} of the last checkpoint, for any devices that wrote it."""
  path = last_checkpoint(workdir) / 'state'
  with ocp.PyTreeCheckpointer() as reader:
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    tree = reader.metadata(path).item_metadata.tree
    state = reader.restore(path, restore_args=jax.tree.map(lambda _: as_numpy, tree))
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def assert_close(one, other):
  """Asserts that two runs have equal steps, and losses and states that are equal up to rounding."""
  for a, b in zip(records(one), records(other), strict=True):
    assert (a['step'], a['split']) == (b['step'], b['split'])
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-4)
  for (path, a), b in zip(final_state(one).items(), final_state(other).values(), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4, err_msg=path)


def assert_equal(one, other):
  """Asserts that two runs have bit-equal parameters, optimizer and iterator states, and metrics."""
  first, second = final_state(one), final_state(other)
  assert first.keys() == second.keys()
  assert any('params' in path for path in first) and any('opt_state' in path for path in first)
  for path, leaf in first.items():
    np.testing.assert_array_equal(leaf, second[path], err_msg=path)
  states = [last_checkpoint(run) / 'data_iterator' / 'metadata' for run in (one, other)]
  assert json.loads(states[0].read_text()) == json.loads(states[1].read_text())
  for a, b in zip(records(one), records(other), strict=True):
    assert {k: a[k] for k in a.keys() - TIMES} == {k: b[k] for k in b.keys() - TIMES}
