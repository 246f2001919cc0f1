"""Results in npz files: rows survive a restart, corrupt files are computed again."""

import numpy as np
import pytest
from etils import epath

from farmer_jax import errors
from farmer_jax.workdir import results

NAMES = {'image': 'arr_0', 'label': 'label'}


@pytest.fixture(name='folder')
def _folder(tmp_path, monkeypatch):
  """Files of three rows; seven rows are written."""
  monkeypatch.setattr(results, 'ROWS_PER_FILE', 3)
  store = results.ResultFiles(epath.Path(tmp_path), NAMES)
  for start, end in ((0, 2), (2, 7)):
    store.append(image=np.ones((end - start, 2)), label=np.arange(start, end))
  store.flush()
  return epath.Path(tmp_path)


def test_rows_are_found_again(folder):
  store = results.ResultFiles(folder, NAMES)
  assert len(store) == 7
  np.testing.assert_array_equal(store.read('label', 7, start=2), np.arange(2, 7))
  assert sorted(path.name for path in folder.iterdir()) == [f'0000{i}.npz' for i in range(3)]


def test_rows_after_a_corrupt_file_are_discarded(folder, caplog):
  (folder / '00001.npz').write_bytes(b'')
  assert len(results.ResultFiles(folder, NAMES)) == 3
  assert '00001.npz' in caplog.text


def test_damage_of_an_array_that_is_not_counted_is_found(folder, caplog):
  """The images of a full file are damaged, and its labels are valid."""
  file = folder / '00000.npz'
  content = bytearray(file.read_bytes())
  content[content.index(np.ones((3, 2)).tobytes()) + 5] ^= 1
  file.write_bytes(content)
  assert len(results.ResultFiles(folder, NAMES)) == 0
  assert '00000.npz' in caplog.text


def test_missing_rows_of_another_process_are_an_error(folder):
  with pytest.raises(errors.ProcessError, match=str(folder)):
    results.ResultFiles(folder, NAMES).read('label', 9)
