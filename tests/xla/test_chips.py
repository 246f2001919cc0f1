"""Device kinds are found by their longest known prefix."""

from farmer_jax.xla import chips


def test_longest_prefix_wins_and_unknown_devices_have_no_figures():
  for kind, flops in (
    ('TPU v5 lite', 197e12),
    ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('cpu', None),
  ):
    assert chips.peak_flops(kind) == flops
  assert [chips.memory(kind) for kind in ('TPU v5 lite', 'cpu')] == [16 * 2**30, None]
  assert [chips.clock(kind) for kind in ('TPU v4', 'cpu')] == [1.05e9, None]
