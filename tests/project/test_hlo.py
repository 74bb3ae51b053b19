"""Kernels are found in the text of a program. The text is shortened from XLA's, for an H100."""

import zlib

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from benchmarks import hlo

PACKED = "".join(f"\\{byte:02X}" for byte in zlib.compress(b"\x12\x18reshape_and_cache_kernel\x1a"))
PROGRAM = f"""HloModule jit_run, is_scheduled=true, entry_computation_layout={{(bf16[64,2048]{{1,0}})->s32[]}}

%fused_slice (param_0.24: f32[8,64]) -> bf16[64] {{
  %param_0.24 = f32[8,64]{{1,0}} parameter(0)
  ROOT %slice.8.1 = bf16[64]{{0}} slice(%param_0.24), slice={{[0:64], [0:1024]}}
}}

%dynamic-slice-fusion (p0: bf16[64]) -> (bf16[32,64]{{1,0}}) {{
  %p0 = bf16[64]{{0}} parameter(0)
  %slice.2 = bf16[32]{{0}} slice(%p0), slice={{[0:32]}}
  %call.10 = (bf16[32,64]{{1,0}}) custom-call(%slice.2), custom_call_target="triton_kernel_call_ffi", \
output_to_operand_aliasing={{{{0}}: (2, {{}})}}, backend_config={{opaque = "{PACKED}"}}
  ROOT %tuple = (bf16[32,64]{{1,0}}) tuple(%call.10)
}}

%body.clone (arg: (s32[], bf16[64])) -> (s32[], bf16[64]) {{
  %arg = (s32[], bf16[64]{{0}}) parameter(0)
  %get-tuple-element.1 = bf16[64]{{0}} get-tuple-element(%arg), index=1
  %loop_slice_fusion.1 = bf16[64]{{0}} fusion(%get-tuple-element.1), kind=kLoop, calls=%fused_slice
  %dynamic_slice_fusion = (bf16[32,64]{{1,0}}) fusion(%loop_slice_fusion.1), kind=kCustom, calls=%dynamic-slice-fusion
  %loop_slice_fusion = bf16[64]{{0}} fusion(%get-tuple-element.1), kind=kLoop, calls=%fused_slice
  %gemm = (bf16[64]{{0}}, s8[4]{{0}}) custom-call(%loop_slice_fusion), custom_call_target="__cublas$gemm"
  %copy-start = (bf16[64]{{0}}, bf16[64]{{0}}, u32[]) copy-start(%loop_slice_fusion)
  %copy-done = bf16[64]{{0}} copy-done(%copy-start)
  ROOT %tuple.2 = (s32[], bf16[64]{{0}}) tuple(%arg, /*index=1*/%copy-done)
}}

%condition (arg.2: (s32[], bf16[64])) -> pred[] {{
  %arg.2 = (s32[], bf16[64]{{0}}) parameter(0)
  ROOT %loop_compare_fusion = pred[] fusion(%arg.2), kind=kLoop, calls=%fused_slice
}}

ENTRY %main.5 (x.1: bf16[64,2048]) -> s32[] {{
  %x.1 = bf16[64,2048]{{1,0}} parameter(0), metadata={{op_name="x"}}
  %copy.38 = bf16[64,2048]{{1,0}} copy(%x.1)
  %while.21 = (s32[], bf16[64]{{0}}) while(%copy.38), condition=%condition, body=%body.clone
  ROOT %get-tuple-element.9 = s32[] get-tuple-element(%while.21), index=0
}}
"""
LAYER = ["loop_slice_fusion", "reshape_and_cache_kernel", "loop_slice_fusion", "__cublas$gemm", "copy-start"]
COUNTED = "2 × loop_slice_fusion, reshape_and_cache_kernel, __cublas$gemm, copy-start"


def test_kernels_of_a_loop_and_of_the_program():
    text = PROGRAM.replace("\\\n", "")
    assert hlo.kernels(text, loops=1) == LAYER
    assert hlo.counted(LAYER) == COUNTED
    assert hlo.kernels(text) == ["copy", f"while [{COUNTED}]"]


def test_loops_that_are_unrolled_are_not_missed():
    assert hlo.kernels(PROGRAM, loops=2) == LAYER


def test_one_of_two_loops_is_not_guessed():
    loop = next(line for line in PROGRAM.splitlines() if " while(" in line)
    with pytest.raises(ValueError, match=r"main\.5 must have at most one loop, got 2"):
        hlo.kernels(PROGRAM.replace(loop, f"{loop}\n{loop.replace('while.21', 'while.22')}"), loops=1)
    with pytest.raises(ValueError, match="entry computation"):
        hlo.kernels("")


def test_a_program_of_this_jax():
    compiled = jax.jit(lambda x: jnp.sort(x) @ x.T).lower(jnp.ones((8, 8))).compile()
    names = hlo.kernels(compiled.as_text())
    assert any("sort" in name for name in names)
    assert not {"parameter", "tuple", "bitcast"} & set(names)
