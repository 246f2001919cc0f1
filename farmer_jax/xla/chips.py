"""Peak FLOP/s, clock frequency and memory of accelerators, by `jax.Device.device_kind`.

A key matches every device kind that starts with the key. The longest matching key is used. JAX
reports 'TPU v5 lite' for a v5e chip and 'TPU v5' or 'TPU v5p' for a v5p chip.
"""

# Dense bfloat16 FLOP/s of one JAX device, without sparsity. Sources: cloud.google.com/tpu/docs and
# NVIDIA's data sheets.
_PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA B200': 2250e12,
}

# Cycles per second and bytes of memory. --job=compile needs them for TPUs that are not attached.
_CLOCK = {'TPU v4': 1.05e9, 'TPU v5 lite': 1.5e9, 'TPU v5': 1.75e9}
_MEMORY: dict[str, float] = {'TPU v4': 32 * 2**30, 'TPU v5 lite': 16 * 2**30, 'TPU v5': 95 * 2**30}


def peak_flops(device_kind: str) -> float | None:
  """Returns the peak bfloat16 FLOP/s of one device, or None for an unknown device."""
  return _lookup(_PEAK_FLOPS, device_kind)


def clock(device_kind: str) -> float | None:
  """Returns the clock frequency of one TPU in Hz, or None for an unknown device."""
  return _lookup(_CLOCK, device_kind)


def memory(device_kind: str) -> float | None:
  """Returns the memory of one TPU in bytes, or None for an unknown device."""
  return _lookup(_MEMORY, device_kind)


def _lookup(table: dict[str, float], device_kind: str) -> float | None:
  matches = [kind for kind in table if device_kind.startswith(kind)]
  return table[max(matches, key=len)] if matches else None
