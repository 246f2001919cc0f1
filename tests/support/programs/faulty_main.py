"""Runs the command line with one fault, or with one slow part replaced.

    python -m tests.support.programs.faulty_main FAULT=ARGUMENT,... [arguments of farmer_jax.main]

FAULT is the name of a function in this file.
"""

import os
import pathlib
import resource
import signal
import sys
import time

import jax
from orbax.checkpoint import path as ocp_path

from farmer_jax import checkpoints, jobs, main
from farmer_jax.checkpoints import orbax_internals
from farmer_jax.data import base
from farmer_jax.distributed import preemption
from farmer_jax.evaluation import classifier, feature_networks
from farmer_jax.workdir import results


def replace(owner, name):
  """Decorates the replacement of a function, which receives the original as first argument."""
  original = getattr(owner, name)
  return lambda function: setattr(owner, name, lambda *args, **kw: function(original, *args, **kw))


def slow_commit(step, signal_file):
  """Creates `signal_file` and hangs before checkpoint `step` gets its final name."""

  @replace(ocp_path.atomicity.AtomicRenameTemporaryPath, 'finalize')
  async def slow_finalize(finalize, self, *args, **kwargs):
    if self.get_final().name == step:
      hang(signal_file)
    return await finalize(self, *args, **kwargs)


def slow_barrier(step, signal_file):
  """Process 1 writes its shard of checkpoint `step`, creates `signal_file` and hangs."""

  @replace(orbax_internals, 'make_barrier')
  def make_slow_barrier(make_barrier):
    barrier = make_barrier()

    def wait(*, key, timeout_ms):
      if 'async_write_complete' in key and step in key and jax.process_index():
        hang(signal_file)
      return barrier(key=key, timeout_ms=timeout_ms)

    return wait


def small_files(step, size):
  """Process 1 cannot write files of more than `size` bytes in checkpoint `step`."""

  @replace(checkpoints.Checkpointer, 'save')
  def save_with_limit(save, self, saved_step, *args, **kwargs):
    self.wait()
    if jax.process_index():
      limit = int(size) if saved_step == int(step) else resource.RLIM_INFINITY
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save(self, saved_step, *args, **kwargs)


def sigterm(step, process):
  """Process `process` sends SIGTERM to itself after step `step`."""

  @replace(preemption.PreemptionListener, 'should_stop')
  def should_stop_after_sigterm(should_stop, self, current_step):
    if current_step == int(step) and jax.process_index() == int(process):
      os.kill(os.getpid(), signal.SIGTERM)
    return should_stop(self, current_step)


def hang(signal_file):
  """Creates `signal_file` and waits for ten minutes."""
  pathlib.Path(signal_file).touch()
  time.sleep(600)


def slow_step(signal_file):
  """After the first step, creates `signal_file` and hangs."""
  preemption.PreemptionListener.should_stop = lambda self, step: hang(signal_file)


def short_classifier(steps):
  """The classifier of --job=fidelity trains for a few steps."""
  assert classifier._STEPS
  classifier._STEPS = int(steps)


def small_shards(rows, seconds_between_writes, kill_at='inf'):
  """Files of results have `rows` rows. SIGKILL ends this process after `kill_at` rows."""
  results.ROWS_PER_FILE = int(rows)
  results._SECONDS_BETWEEN_WRITES = float(seconds_between_writes)

  @replace(results.ResultFiles, 'append')
  def append_and_die(append, self, **arrays):
    append(self, **arrays)
    if len(self) >= float(kill_at):
      os.kill(os.getpid(), signal.SIGKILL)


def kill_before_features():
  """SIGKILL ends this process before it computes the features of the samples."""

  @replace(feature_networks.FeatureNetwork, 'statistics')
  def statistics_of_real_images(statistics, self, images, description, *args, **kwargs):
    if description == 'samples':
      os.kill(os.getpid(), signal.SIGKILL)
    return statistics(self, images, description, *args, **kwargs)


def images_in_files():
  """Images are read from files instead of being cached in memory."""
  base.IN_MEMORY_BYTES = 0


def little_memory(gibibytes):
  """This process can map no more than this number of GiB more than it has mapped already."""

  @replace(jobs, 'run')
  def run_with_limit(run, *args):
    jax.devices()
    mapped = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    limit = mapped + int(float(gibibytes) * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    run(*args)


def no_tensorboard():
  """TensorFlow, which takes several seconds to load, cannot be imported."""
  sys.modules['clu.metric_writers'] = None


if __name__ == '__main__':
  name, _, arguments = sys.argv.pop(1).partition('=')
  globals()[name](*filter(None, arguments.split(',')))
  main.run()
