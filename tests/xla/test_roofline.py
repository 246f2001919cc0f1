"""Rooflines of programs with known FLOPs and bytes."""

import jax
import jax.numpy as jnp
import pytest

from farmer_jax.xla import cycles, flops, hlo, roofline, traffic

H100 = flops.chip('NVIDIA H100 80GB HBM3')

# The format of XLA's GPU compiler. The loop multiplies x by five stacked matrices, and stores each
# product in a stack.
SCAN = """HloModule jit_f, is_scheduled=true

%gemm (p0: bf16[512,1024], p1: bf16[5,1024,1024], p2: s32[]) -> bf16[512,1024] {
  %p0 = bf16[512,1024]{1,0} parameter(0)
  %p1 = bf16[5,1024,1024]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %index = s32[] add(%p2, %zero)
  %slice = bf16[1,1024,1024]{2,1,0} dynamic-slice(%p1, %index, %zero, %zero), METADATA
  %w = bf16[1024,1024]{1,0} bitcast(%slice)
  ROOT %dot = bf16[512,1024]{1,0} dot(%p0, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%store (stack: bf16[5,512,1024], i: s32[], new: bf16[512,1024]) -> bf16[5,512,1024] {
  %stack = bf16[5,512,1024]{2,1,0} parameter(0)
  %new = bf16[512,1024]{1,0} parameter(2)
  %row = bf16[1,512,1024]{2,1,0} bitcast(%new)
  %i = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %update = bf16[5,512,1024]{2,1,0} dynamic-update-slice(%stack, %row, %i, %zero.1, %zero.1)
}

%body (t: (s32[], bf16[512,1024], bf16[5,512,1024], bf16[5,1024,1024])) -> (s32[]) {
  %t = (s32[], bf16[512,1024]{1,0}, bf16[5,512,1024]{2,1,0}, /*index=3*/bf16[5,1024,1024]) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x = bf16[512,1024]{1,0} get-tuple-element(%t), index=1
  %xs = bf16[5,512,1024]{2,1,0} get-tuple-element(%t), index=2
  %ws = bf16[5,1024,1024]{2,1,0} get-tuple-element(%t), index=3
  %y = bf16[512,1024]{1,0} fusion(%x, %ws, %n), kind=kCustom, calls=%gemm
  %ys = bf16[5,512,1024]{2,1,0} fusion(%xs, %n, %y), kind=kLoop, calls=%store
  ROOT %out = (s32[], bf16[512,1024]{1,0}, bf16[5,512,1024]{2,1,0}, bf16[5,1024,1024]) tuple(%n, %y, %ys, %ws)
}

%condition (t: (s32[])) -> pred[] {
  %limit = s32[] constant(5)
  %k = s32[] parameter(0)
  ROOT %lt = pred[] compare(%k, %limit), direction=LT
}

ENTRY %main (x: bf16[512,1024], ws: bf16[5,1024,1024]) -> (s32[], bf16[512,1024]) {
  %a = bf16[512,1024]{1,0} parameter(0)
  %b = bf16[5,1024,1024]{2,1,0} parameter(1)
  %c = s32[] constant(0)
  %empty = bf16[5,512,1024]{2,1,0} broadcast(%c), dimensions={}
  %init = (s32[], bf16[512,1024]{1,0}, bf16[5,512,1024]{2,1,0}, bf16[5,1024,1024]{2,1,0}) tuple(%c, %a, %empty, %b)
  ROOT %loop = (s32[], bf16[512,1024]{1,0}, bf16[5,512,1024]{2,1,0}, bf16[5,1024,1024]) while(%init), condition=%condition, body=%body
}
"""  # noqa: E501
SCAN = SCAN.replace(
  'METADATA', 'dynamic_slice_sizes={1,1024,1024}, metadata={op_name="f(x)/while"}'
)
X, W, INDEX = 512 * 1024 * 2, 1024 * 1024 * 2, 4  # bytes


def bound(text, chip=H100):
  program = hlo.Program(text)
  return roofline.bound(program, cycles.cost(program), chip)


def entry(*lines, prefix=''):
  body = '\n'.join(f'  {line}' for line in lines)
  return f'{prefix}ENTRY %main (p: f32[2]) -> f32[8] {{\n{body}\n}}\n'


def test_loop_over_stacked_arrays_counts_slices_times_the_trip_count():
  found = bound(SCAN)
  products, copies = (found['kinds'][kind] for kind in ('matrix products', 'copies'))
  assert products['flops'] == found['flops'] == 5 * 2 * 512 * 1024 * 1024
  assert products['bytes_read'] == 5 * (X + W + INDEX)
  assert products['bytes_written'] == 5 * X
  # Each iteration writes one row of the stack, which `%empty` has filled before.
  assert copies['bytes_written'] == 5 * X + 5 * X
  assert copies['bytes_read'] == 5 * (X + INDEX) + INDEX
  assert found['kernels'] == 11
  seconds = max(2 * 512 * 1024**2 / 989e12, (2 * X + W) / 3.35e12)
  assert products['seconds'] == pytest.approx(5 * seconds, rel=1e-3)
  assert found['bound_seconds'] == products['seconds'] + copies['seconds']


@pytest.mark.parametrize(
  ('dtype', 'precision', 'rate'),
  [
    ('bf16', '', 989e12),
    ('f32', '', 989e12 / 2),
    ('f32', ', operand_precision={highest,highest}', 67e12),
  ],
)
def test_large_product_takes_its_flops_at_the_peak(dtype, precision, rate):
  n = 8192
  array = f'{dtype}[{n},{n}]{{1,0}}'
  dims = f'lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}{precision}'
  text = entry(
    f'%a = {array} parameter(0)',
    f'%b = {array} parameter(1)',
    f'ROOT %c = {array} dot(%a, %b), {dims}',
  )
  assert bound(text)['bound_seconds'] == pytest.approx(2 * n**3 / rate, rel=0.01)
  assert bound(text)['kinds']['matrix products']['kernels'] == 1


def test_cublas_call_and_convolution_have_the_flops_of_their_product():
  config = '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]'
  text = entry(
    '%a = bf16[64,256]{1,0} parameter(0)',
    '%b = bf16[256,32]{1,0} parameter(1)',
    '%c = (bf16[64,32]{1,0}, s8[4096]{0}) custom-call(%a, %b),'
    f' custom_call_target="__cublas$gemm", backend_config={{{config}}}',
    'ROOT %d = bf16[64,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf',
  )
  assert bound(text)['flops'] == 2 * (2 * 64 * 256 * 32)


def test_cublas_call_of_exact_products_uses_no_matrix_units():
  n = 8192
  dims = '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]'
  precision = '"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}'
  text = entry(
    f'%a = f32[{n},{n}]{{1,0}} parameter(0)',
    f'ROOT %c = f32[{n},{n}]{{1,0}} custom-call(%a, %a), custom_call_target="__cublas$gemm",'
    f' backend_config={{{dims},{precision}}}',
  )
  assert bound(text)['bound_seconds'] == pytest.approx(2 * n**3 / 67e12, rel=0.01)


def test_batch_of_products_as_a_convolution_counts_no_padding():
  """XLA for TPUs: 8 products [16, 32] x [32, 64]. The window covers one element of the input."""
  text = entry(
    '%a = bf16[8,16,32]{2,1,0} parameter(0)',
    '%b = bf16[8,32,64]{2,1,0} parameter(1)',
    'ROOT %c = bf16[8,16,64]{2,1,0} convolution(%a, %b),'
    ' window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf',
  )
  assert bound(text)['flops'] == 8 * 2 * 16 * 32 * 64


def test_elementwise_work_runs_at_the_rate_of_the_vector_units_or_of_the_memory():
  fused = """%f (p: f32[1000]) -> f32[1000] {
  %p = f32[1000]{0} parameter(0)
  %e = f32[1000]{0} exponential(%p)
  ROOT %m = f32[1000]{0} multiply(%e, %e)
}

"""
  text = entry(
    '%a = f32[1000]{0} parameter(0)',
    'ROOT %b = f32[1000]{0} fusion(%a), kind=kLoop, calls=%f',
    prefix=fused,
  )
  row = bound(text)['kinds']['elementwise']
  assert (row['flops'], row['bytes_read'], row['bytes_written']) == (2000, 4000, 4000)
  assert row['seconds'] == pytest.approx(8000 / 3.35e12)
  slow = H100._replace(vector_flops=1e6)
  assert bound(text, slow)['kinds']['elementwise']['seconds'] == pytest.approx(2e-3)


def test_update_that_is_not_in_place_writes_the_whole_array():
  program = hlo.Program(
    SCAN.replace('(%stack, %row', '(%other, %row').replace(
      '  %new = bf16', '  %other = bf16[5,512,1024]{2,1,0} negate(%stack)\n  %new = bf16'
    )
  )
  body = program['body']
  assert traffic.moved(program, body, body['ys']) == (5 * X + INDEX + X, 5 * X)


def test_slices_inside_nested_fusions_and_arrays_in_fast_memory():
  """The format of XLA's TPU compiler. S(1) is the vector memory."""
  text = """%inner (w: bf16[5,64,64], i: s32[]) -> bf16[1,64,64] {
  %w = bf16[5,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = bf16[1,64,64]{2,1,0:T(8,128)(2,1)} dynamic-slice(%w, %i, %i, %i)
}

%outer (w: bf16[5,64,64], i: s32[]) -> bf16[64,64] {
  %w.1 = bf16[5,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i.1 = s32[] parameter(1)
  %f = bf16[1,64,64]{2,1,0:T(8,128)(2,1)} fusion(%w.1, %i.1), kind=kLoop, calls=%inner
  ROOT %r = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} reshape(%f)
}

""" + entry(
    '%a = bf16[5,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)',
    '%n = s32[] constant(3)',
    '%b = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %n), kind=kOutput, calls=%outer',
    '%c = (bf16[64,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0}, u32[]{:S(2)}) copy-start(%b)',
    'ROOT %d = bf16[64,64]{1,0} copy-done(%c)',
  )
  row = bound(text)['kinds']['copies']
  assert row['bytes_read'] == 64 * 64 * 2 + 4
  assert row['bytes_written'] == 64 * 64 * 2


def test_collectives_overlap_or_not():
  text = entry(
    '%a = f32[1000]{0} parameter(0)',
    '%b = f32[1000]{0} negate(%a)',
    'ROOT %c = f32[1000]{0} all-reduce(%b), replica_groups={{0,1,2,3}}, to_apply=%add',
  )
  program = hlo.Program(text)
  one, two = (
    roofline.bound(program, cycles.cost(program, 4, per_host), H100) for per_host in (4, 2)
  )
  device = 8000 / 3.35e12
  for found, links in (one, 2 * 4000 * 3 / 4 / 450e9), (two, 2 * 4000 / 2 / 2 / 50e9):
    assert found['collective_seconds'] == pytest.approx(links)
    assert found['bound_seconds'] == pytest.approx(max(device, links))
    assert found['bound_seconds_without_overlap'] == pytest.approx(device + links)


def test_unknown_chip_has_counts_but_no_times():
  found = bound(SCAN, flops.chip('cpu'))
  assert found['flops'] and found['bytes_read'] and found['bound_seconds'] is None


def test_flops_of_a_compiled_program_are_those_of_the_compiler():
  """XLA's cost analysis counts the body of a loop once."""

  def products(a, b, c):
    return jnp.einsum('bij,bjk->ik', a, b) @ c

  def repeated(a, b, c):
    return jax.lax.scan(lambda x, _: (x @ c, None), products(a, b, c), length=7)[0]

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 16, 32), (3, 32, 64), (64, 64))]
  once = jax.jit(products).lower(*shapes).compile()
  expected = 2 * 3 * 16 * 32 * 64 + 2 * 16 * 64 * 64
  assert once.cost_analysis()['flops'] == pytest.approx(expected, rel=0.01)
  found = bound(once.as_text(), flops.chip('cpu'))
  assert found['kinds']['matrix products']['flops'] == expected

  loop = jax.jit(repeated).lower(*shapes).compile()
  found = bound(loop.as_text(), flops.chip('cpu'))
  assert found['kinds']['matrix products']['flops'] == expected + 7 * 2 * 16 * 64 * 64
