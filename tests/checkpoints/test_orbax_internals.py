"""Behavior of Orbax, TensorStore and JAX on which `orbax_internals` relies."""

import inspect
import re
import sys
import types

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint._src.checkpointers import async_checkpointer
from orbax.checkpoint._src.path import atomicity_defaults
from orbax.checkpoint._src.serialization import tensorstore_utils

from farmer_jax import errors
from farmer_jax.checkpoints import orbax_internals
from tests.support import checkpoints


def test_barriers_of_a_save_have_the_known_keys():
  keys = set(re.findall(r"'(async_[a-z_]+)'", inspect.getsource(async_checkpointer)))
  assert {'async_write_complete', 'async_commit_complete'} <= keys
  assert 'async_'.startswith(orbax_internals._SAVE_BARRIER)


def test_failed_save_has_the_known_text_and_log_record(tmp_path, caplog):
  logger = absl_logging.get_absl_logger()
  logger.removeFilter(orbax_internals._is_not_orbax_error)
  try:
    manager = ocp.CheckpointManager(tmp_path / 'a')
    with checkpoints.file_size_limit(300), pytest.raises(Exception) as error:
      manager.save(1, args=ocp.args.StandardSave({'a': np.random.normal(size=1000)}))
      manager.wait_until_finished()
  finally:
    orbax_internals.hide_orbax_errors()
  assert orbax_internals.describe(error.value) == 'File too large'
  hidden = [record for record in caplog.records if not orbax_internals._is_not_orbax_error(record)]
  assert hidden and all(record.exc_info for record in hidden)


def test_operations_after_a_failure_print_no_tracebacks(monkeypatch):
  printed = []
  monkeypatch.setattr(sys, 'unraisablehook', printed.append)
  orbax_internals.hide_orbax_errors()
  for text in 'Event loop is closed', 'another error':
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
  assert [str(unraisable.exc_value) for unraisable in printed] == ['another error']


def test_orbax_can_be_changed_to_support_s3(monkeypatch):
  monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://localhost:1')
  spec = tensorstore_utils.build_kvstore_tspec('s3://bucket/run/4', use_ocdbt=True)
  expected = {'driver': 's3', 'bucket': 'bucket', 'path': 'run/4', 'endpoint': 'http://localhost:1'}
  assert expected.items() <= spec['base'].items()
  path = epath.Path('s3://bucket/run/4')
  chosen = atomicity_defaults.get_default_temporary_path_class(path)
  assert chosen is ocp.path.atomicity.CommitFileTemporaryPath
  spec = tensorstore_utils.build_kvstore_tspec('gs://bucket/run', use_ocdbt=True)
  assert {'driver': 'gcs', 'bucket': 'bucket', 'path': 'run'}.items() <= spec['base'].items()


def test_missing_array_has_the_known_text(tmp_path):
  store = {'driver': 'file', 'path': str(tmp_path / 'missing')}
  with pytest.raises(ValueError) as missing:
    tensorstore.open({'driver': 'zarr', 'kvstore': store}).result()
  assert orbax_internals.describe(missing.value) == 'an array cannot be read: not found'


def test_faults_of_the_environment_are_not_corruption():
  permission = PermissionError(13, 'Permission denied', '/checkpoints/6/state')
  for error in permission, MemoryError(), ValueError('UNAVAILABLE: the server did not answer'):
    with pytest.raises(errors.CheckpointError), orbax_internals.classify_exceptions():
      raise error


def test_list_of_items_and_private_modules(workdir):
  checkpoints.save(workdir, [6])
  names = orbax_internals.item_names(epath.Path(workdir / 'checkpoints' / '6'))
  assert names == {'state', 'data_iterator', 'manifest'}
  assert callable(orbax_internals.multihost.get_jax_distributed_client)
  assert ocp.path.atomicity_types.TMP_DIR_SUFFIX == '.orbax-checkpoint-tmp'
