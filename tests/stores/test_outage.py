"""A run continues after its object store was unreachable for a minute, and loses nothing."""

import signal
import time

import pytest

from farmer_jax.workdir import layout, metrics
from farmer_jax.workdir import stores as workdir_stores
from tests.support import processes, stores

pytest.importorskip('gcp_storage_emulator', reason='make stores installs the emulators')
pytestmark = pytest.mark.stores
STEPS = 1000


@pytest.mark.parametrize('scheme, step', [('gs', 100), ('s3', 200)])
def test_outage_of_a_minute(scheme, step, tmp_path):
  with stores.running(scheme, tmp_path) as store:
    workdir = layout.absolute(f'{store.url}/run')
    changes = f'train.steps={STEPS} train.checkpoint_every=100 train.validate_every=0'.split()
    job = processes.train(workdir, *changes, logs=tmp_path / 'run', devices=1)
    job.wait_for(lambda: (workdir / 'checkpoints' / str(step) / 'commit_success.txt').exists())
    if scheme == 'gs':  # Connections are refused. The emulator of S3 has its objects in memory.
      store.stop()
      # An outage must not look like a workdir without checkpoints.
      for function in workdir.exists, workdir.is_dir, (workdir / 'config.json').is_file:
        with pytest.raises(workdir_stores.StoreError):
          function()
      store.start()
    else:
      store.process.send_signal(signal.SIGSTOP)
      time.sleep(60)
      store.process.send_signal(signal.SIGCONT)
    job.finish()  # After step 100, the first checkpoint of the run is read back.
    assert 'Traceback' not in job.log()
    assert (workdir / 'checkpoints' / str(STEPS)).exists()
    records = [r['step'] for r in metrics.read(workdir) if r['split'] == 'train']
  assert records == list(range(1, STEPS + 1))
