"""Devices to compile for that are not attached: slices of TPUs, and hosts with GPUs."""

import collections
import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from farmer_jax import errors

_TPUS = 'v5e', 'v5p', 'v6e'
_SIZES = re.compile(r'\d+(x\d+)*')


class _Gpu(NamedTuple):
  """Properties of a GPU that the compiler asks for."""

  name: str
  capability: int  # the compute capability
  cores: int  # streaming multiprocessors
  units: int  # FP32 units of a multiprocessor
  shared: int  # bytes of shared memory of a multiprocessor
  block: int  # bytes of shared memory that a block can request
  cache: int  # bytes of the level-2 cache
  clock: float  # GHz
  memory: int  # bytes
  bandwidth: int  # bytes/s


# Source: xla/backends/gpu/target_config/specs of OpenXLA.
_HOPPER = 9, 132, 128, 233472, 232448, 52428800, 1.98
_GPUS = {
  'a100': _Gpu(
    *('NVIDIA A100-SXM4-80GB', 8, 108, 64, 167936, 166912, 41943040, 1.41),
    *(85100068864, 2039040000000),
  ),
  'b200': _Gpu(
    *('NVIDIA B200', 10, 148, 128, 233472, 232448, 132644864, 1.965),
    *(191514411008, 7672320000000),
  ),
  'h100': _Gpu('NVIDIA H100 80GB HBM3', *_HOPPER, 84942979072, 3352320000000),
  'h200': _Gpu('NVIDIA H200 141GB HBM3e', *_HOPPER, 151397597184, 4800000000000),
}
# A `GpuTargetConfigProto` in text form.
_TARGET = """gpu_device_info {{
  cuda_compute_capability {{ major: {capability} }} core_count: {cores} fpus_per_core: {units}
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {block} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory} memory_bandwidth: {bandwidth}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""


def devices(topology: str | None) -> list[jax.Device]:
  """Returns the devices of a topology, or the attached devices for None.

  v5e:16x16 is a slice of 256 TPUs, h100:8 a host with 8 GPUs, and h100:4x8 four such hosts.

  Raises:
    ConfigError: there is no such topology, or the compiler is not installed.
  """
  if topology is None:
    return jax.devices()
  chip, _, size = topology.partition(':')
  is_gpu = chip in _GPUS
  axes = size.split('x')
  if chip not in (*_GPUS, *_TPUS) or not _SIZES.fullmatch(size) or (is_gpu and len(axes) > 2):
    raise errors.ConfigError(
      f'--config.compile.topology={topology} is unknown; use a number of GPUs such as h100:8, a'
      f' number of hosts and GPUs of each such as h100:4x8 ({", ".join(_GPUS)}), or a slice of TPUs'
      f' such as v5e:16x16 or v5p:4x4x8 ({", ".join(_TPUS)})'
    )
  _require_compiler(topology, is_gpu)
  try:
    return _gpus(chip, axes) if is_gpu else _tpus(topology)
  except Exception as error:  # The type depends on the cause.
    raise errors.ConfigError(
      f'cannot compile for --config.compile.topology={topology} ({errors.reason(error)})'
    ) from error


def per_host(devices: list[jax.Device]) -> int:
  """Returns the number of devices that a fast link connects: a host of GPUs, or all TPUs."""
  if devices[0].platform == 'tpu':
    return len(devices)
  return max(collections.Counter(device.process_index for device in devices).values())


def _require_compiler(topology: str, is_gpu: bool) -> None:
  """Raises ConfigError if a package that compiling needs is missing."""
  if is_gpu:
    version = jax.__version__
    packages = f'jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} nvidia-cudnn-cu12'
    command = f'pip install --no-deps {packages}'
    plugins = 'jax_cuda12_plugin', 'jax_cuda13_plugin'
    complete = any(map(importlib.util.find_spec, plugins)) and _is_installed('nvidia.cudnn')
  else:
    command, complete = 'pip install "farmer_jax[tpu]"', _is_installed('libtpu')
  if not complete:
    raise errors.ConfigError(
      f'--config.compile.topology={topology} needs a compiler that is not installed: {command}'
    )


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # The parent package is missing.
    return False


def _tpus(topology: str) -> list[jax.Device]:
  # libtpu must neither wait for a metadata server nor lock a device.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  return topologies.get_topology_desc(topology, platform='tpu').devices


def _gpus(chip: str, axes: list[str]) -> list[jax.Device]:
  target = _TARGET.format(**_GPUS[chip]._asdict())
  # NVLink domains, hosts of each, and GPUs of each.
  shape = '1x' + 'x'.join(['1', *axes][-2:])
  return topologies.get_topology_desc(
    chip, platform='cuda', target_config=target, topology=shape
  ).devices
