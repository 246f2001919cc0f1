"""Costs of compiled programs: a text with a known cost, and a program compiled here."""

import re

import jax
import jax.numpy as jnp
import pytest

from farmer_jax.xla import cycles, hlo

TEXT = """HloModule jit_f, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %inner = f32[8]{0} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"999"}}
  ROOT %gather = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, dimensions={0}
}

%inner_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, CYCLES(7)
  ROOT %t2 = (s32[], f32[8]) tuple(%i, %f)
}

%inner_condition (t: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]{0:T(256)}) while(%t), condition=%inner_condition, body=%inner_body
  %r = f32[8]{0} all-reduce(%x), to_apply=%add
  ROOT %g = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, CYCLES(100)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  ROOT %c = pred[] custom-call(%t), custom_call_target="something"
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%other (p: f32[8]) -> f32[8] {
  ROOT %again = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, dimensions={0}
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %known = (s32[], f32[8]) while(%t), condition=%condition, body=%body, ROUNDS(3)
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %unknown = f32[8]{0} fusion(%x), kind=kLoop, calls=%add, CYCLES(9223372036854775807)
  ROOT %last = f32[8]{0} fusion(%x), kind=kLoop, calls=%other, CYCLES(1)
}
"""
TEXT = re.sub(r'CYCLES\((\d+)\)', r'backend_config={"estimated_cycles":"\1"}', TEXT)
TEXT = TEXT.replace('ROUNDS(3)', 'backend_config={"known_trip_count":{"n":"3"}}')


def test_cost_multiplies_loop_bodies_by_trip_counts():
  cost = cycles.cost(hlo.Program(TEXT))
  assert cost.cycles == 1 + 3 * (100 + 5 * 7)
  assert cost.count == {'all-gather': 1 + 3 * (1 + 5), 'all-reduce': 3}
  assert cost.bytes == {'all-gather': 128 + 3 * 6 * 128, 'all-reduce': 3 * 32}
  assert cost.unknown_loops == 0 and cost.unknown_cycles == 1
  assert list(cost.operations.values()) == [cost.cycles]


def test_loop_with_unknown_trip_count_counts_once_and_is_reported():
  text = TEXT.replace(', backend_config={"known_trip_count":{"n":"3"}}', '')
  cost = cycles.cost(hlo.Program(text))
  assert cost.unknown_loops == 1
  assert cost.cycles == 1 + 100 + 5 * 7


def test_trip_count_of_a_compiled_scan_is_known_and_other_texts_are_refused():
  """XLA's text for CPUs has no cycles, but it has loops and their trip counts."""
  scan = jax.jit(lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=7)[0])
  text = scan.lower(jnp.ones((4, 4))).compile().as_text()
  assert ' while(' in text
  assert cycles.cost(hlo.Program(text)).unknown_loops == 0

  with pytest.raises(ValueError):
    hlo.Program('hello')
