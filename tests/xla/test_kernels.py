"""Attention kernels in the text of a program: names, FLOPs, and the model of their time on TPUs."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from farmer_jax.xla import cycles, flops, hlo, kernels, roofline, targets

V5E, V6E = flops.chip('TPU v5 lite'), flops.chip('TPU v6 lite')

# The text of a call contains line breaks. 2 images, 4 heads.
SPLASH = """HloModule jit_f

ENTRY %main (q: bf16[2,4,N,D]) -> bf16[2,4,N,D] {
  %next = s8[1,2,2]{2,1,0} constant({ { { 0, 0 }, { 0, 1 } } })
  %marks = s8[1,2,2]{2,1,0} constant(MARKS)
  %copy-start = (s8[1,2,2]{2,1,0:S(1)}, s8[1,2,2]{2,1,0}, u32[]{:S(2)}) copy-start(%marks)
  %copy-done = s8[1,2,2]{2,1,0:S(1)} copy-done(%copy-start)
  %q = bf16[2,4,N,D]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %call = (f32[2,512,128]{2,1,0}, bf16[2,4,N,D]{3,2,1,0:T(8,128)(2,1)}) custom-call(%next, %copy-done, %q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_qSUFFIX\\": 512, \\"block_kvSUFFIX\\": 512, \\"q_layout\\": 1}"
}}, metadata={op_name="jit(f)/splash_mha_PHASE_residuals/pallas_call" stack_frame_id=6}, backend_config={"custom_call_config":{"body":"TU"}}
}
"""  # noqa: E501
CAUSAL = '{ { { 1, 0 }, { 2, 1 } } }'
CUDNN = """HloModule jit_f

ENTRY %main (q: bf16[4,256,12,64]) -> bf16[4,12,256,64] {
  %q = bf16[4,256,12,64]{3,2,1,0} parameter(0)
  ROOT %call = (bf16[4,12,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxPASS", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "12", "256", "256"]}, "mask_type": "MASK"}}
}
"""  # noqa: E501


def splash(phase='fwd', n=1024, width=64, marks=CAUSAL):
  text = SPLASH.replace('N,D', f'{n},{width}').replace('MARKS', marks).replace('PHASE', phase)
  text = text.replace('SUFFIX', '' if phase == 'fwd' else f'_{phase}')
  program = hlo.Program(text)
  return program, kernels.attention(program.entry, program.entry['call'])


def test_forward_kernel_counts_the_blocks_that_run():
  program, kernel = splash()
  assert kernels.calls(program) == {'splash_mha_fwd_residuals': 1}
  assert kernels.family(kernels.calls(program)) == 'splash'
  heads, scores = 2 * 4, 3 * 512 * 512
  assert kernel.scores == heads * scores
  assert kernel.products == 2 * 2 * 64 * heads * scores
  assert kernel.needed_flops == 2 * 2 * 64 * heads * 1024 * 1025 / 2
  # The last axis of q, k, v and the result has 128 lanes. Keys and values of three blocks are read
  # instead of those of two.
  whole = heads * 1024 * 128 * 2
  small = 2 * 2 * 128 + 2 * 512 * 128 * 4  # marks and scratch
  assert kernel.bytes == 4 * whole + 2 * heads * 512 * 128 * 2 + small


def test_tokens_as_the_last_axis_are_the_same_work_without_padding():
  text = SPLASH.replace('N,D', '64,1024').replace('MARKS', CAUSAL).replace('PHASE', 'fwd')
  program = hlo.Program(text.replace('SUFFIX', '').replace('q_layout\\": 1', 'q_layout\\": 2'))
  turned, kernel = kernels.attention(program.entry, program.entry['call']), splash()[1]
  assert turned._replace(bytes=0) == kernel._replace(bytes=0)
  assert kernel.bytes / 2.1 < turned.bytes < kernel.bytes / 1.9


@pytest.mark.parametrize(('marks', 'blocks'), [('{ { { 2, 2 }, { 2, 2 } } }', 4), ('{...}', 3)])
def test_marks_of_the_blocks_count_and_omitted_marks_are_causal(marks, blocks):
  assert splash(marks=marks)[1].scores == 8 * blocks * 512 * 512


def test_time_is_the_formula_of_the_module():
  _, kernel = splash()
  scores = 8 * 3 * 512 * 512
  matrix = 2 * 2 * 128 * scores / 197e12  # half of the matrix unit works
  assert kernel.seconds(V5E) == pytest.approx(matrix + 8 * scores / 6.1e12)
  slow = V5E._replace(memory_bandwidth=1e9)
  assert kernel.seconds(slow) == pytest.approx(kernel.bytes / 1e9)


def test_narrow_heads_take_the_time_of_a_full_matrix_unit():
  narrow, wide = splash(width=64)[1], splash(width=128)[1]
  assert narrow.seconds(V5E) == pytest.approx(wide.seconds(V5E))
  assert splash(width=256)[1].seconds(V5E) > 1.4 * wide.seconds(V5E)
  # The matrix unit of v6e has 256 columns.
  assert wide.seconds(V6E) == pytest.approx(splash(width=256)[1].seconds(V6E))


def test_backward_kernels_do_more_work():
  work = {phase: splash(phase)[1] for phase in ('fwd', 'dq', 'dkv')}
  scores = work['fwd'].scores
  products = {phase: kernel.products / (2 * 64 * scores) for phase, kernel in work.items()}
  assert products == {'fwd': 2, 'dq': 3, 'dkv': 4}


@pytest.mark.parametrize(
  ('step', 'mask', 'products', 'pairs'),
  [
    ('', 'NO_MASK', 2, 256 * 256),
    ('', 'CAUSAL', 2, 256 * 257 / 2),
    ('Backward', 'CAUSAL', 5, 256 * 257 / 2),
  ],
)
def test_cudnn_flops(step, mask, products, pairs):
  program = hlo.Program(CUDNN.replace('"MASK"', f'"{mask}"').replace('PASS', step))
  assert kernels.family(kernels.calls(program)) == 'cudnn'
  found = roofline.bound(program, cycles.cost(program), flops.chip('NVIDIA H100'))
  row = found['kinds']['attention kernels']
  assert row['flops'] == products * 2 * 4 * 12 * 64 * pairs
  assert row['bytes_read'] == row['bytes_written'] == 4 * 256 * 12 * 64 * 2


def test_other_kernels_have_no_model_and_products_of_xla_are_no_kernels():
  program = hlo.Program(SPLASH.replace('splash_mha', 'my_kernel'))
  assert kernels.seconds(program, V5E) == (0, 1)
  assert kernels.family(kernels.calls(program)) == 'xla'


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu')
@pytest.mark.parametrize('fused', [False, True])
def test_compiled_splash_attention(fused):
  from jax.experimental.pallas.ops.tpu import splash_attention

  tokens, width, heads = 1024, 64, 4
  blocks = dict.fromkeys(('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv'), 512)
  blocks |= dict.fromkeys(('block_kv_dkv', 'block_kv_dkv_compute'), 512)
  blocks |= dict.fromkeys(('block_q_dq', 'block_kv_dq'), None if fused else 512)
  mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((tokens, tokens))] * heads)
  kernel = splash_attention.make_splash_mha(
    mask,
    block_sizes=splash_attention.BlockSizes(**blocks, use_fused_bwd_kernel=fused),
    head_shards=1,
    q_seq_shards=1,
  )
  device = targets.devices('v5e:2x2')[0]
  shape = jax.ShapeDtypeStruct(
    (2, heads, tokens, width), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device)
  )
  gradient = jax.grad(
    lambda q, k, v: jax.vmap(kernel)(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)
  )
  program = hlo.Program(jax.jit(gradient).lower(shape, shape, shape).compile().as_text())
  called = kernels.calls(program)
  phases = ('fwd', 'dkv') if fused else ('fwd', 'dq', 'dkv')
  assert sorted(name.split('_')[2] for name in called) == sorted(phases)
  found = [kernels.attention(program.entry, i) for i in program.entry.values() if kernels.name(i)]
  scores = 2 * heads * 3 * 512**2
  assert [k.scores for k in found] == [scores] * len(phases)
  products = 2 + (5 if fused else 3 + 4)
  assert sum(k.products for k in found) == products * 2 * width * scores
  seconds, unknown = kernels.seconds(program, V5E)
  # Half of the matrix unit is idle, and part of the blocks on the diagonal is hidden.
  assert unknown == 0 and 0.1 < sum(k.needed_flops for k in found) / seconds / 197e12 < 0.4
