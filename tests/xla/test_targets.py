"""Names of devices that are not attached, and compilers that are not installed."""

import importlib.util

import jax
import pytest

from farmer_jax import errors
from farmer_jax.xla import flops, targets


@pytest.mark.parametrize('topology', ['v99:2x2', 'h100', 'h100:', 'h100:8x', 'h100:1x2x8', 'v5e:a'])
def test_unknown_names_list_the_known_ones(topology):
  with pytest.raises(errors.ConfigError, match='h100:4x8.*b200.*v5e:16x16.*v6e') as caught:
    targets.devices(topology)
  assert f'--config.compile.topology={topology} ' in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('topology', 'missing', 'command'),
  [
    ('v5e:2x2', 'libtpu', r'pip install "farmer_jax\[tpu\]"'),
    ('h100:8', 'jax_cuda1', f'pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda'),
    ('h100:4x8', 'nvidia', 'nvidia-cudnn-cu12'),
  ],
)
def test_missing_compiler_is_named(topology, missing, command, monkeypatch):
  def find(name):
    if name.startswith('nvidia.') and missing == 'nvidia':
      raise ModuleNotFoundError(name)  # like the real function if the parent is missing
    return None if name.startswith(missing) else object()

  monkeypatch.setattr(importlib.util, 'find_spec', find)
  with pytest.raises(errors.ConfigError, match=command) as caught:
    targets.devices(topology)
  assert '\n' not in str(caught.value)


def test_attached_devices_are_the_default_and_every_gpu_has_a_data_sheet():
  assert targets.devices(None) == jax.devices()
  assert targets.per_host(jax.devices()) == len(jax.devices())
  for gpu in targets._GPUS.values():
    chip = flops.chip(gpu.name)
    assert chip.rates() and chip.interconnect and chip.network
    assert chip.memory == pytest.approx(gpu.memory, rel=0.01)
    assert chip.memory_bandwidth == pytest.approx(gpu.bandwidth, rel=0.01)
    # A multiply-add per FP32 unit and cycle.
    arithmetic = 2 * gpu.cores * gpu.units * gpu.clock * 1e9
    assert chip.vector_flops == pytest.approx(arithmetic, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('jax_cuda12_plugin'), reason='needs the plugin')
def test_hosts_of_gpus():
  devices = targets.devices('h100:4x8')
  assert [device.process_index for device in devices] == [i // 8 for i in range(32)]
  assert targets.per_host(devices) == 8
  assert len(targets.devices('b200:2')) == 2


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu')
def test_slice_of_tpus_and_one_that_does_not_exist():
  devices = targets.devices('v5e:4x4')
  assert len(devices) == targets.per_host(devices) == 16
  with pytest.raises(errors.ConfigError, match='topology=v5e:3x5'):
    targets.devices('v5e:3x5')
