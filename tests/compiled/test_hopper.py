"""An H100 program with the attention kernel for Hopper in it, compiled without a GPU."""

import re
from unittest import mock

import pytest

pytestmark = pytest.mark.compiled
pytest.importorskip("jax_cuda13_plugin")
pytest.importorskip("triton", minversion="3.8")

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from jaxkv._triton import launch as _launch
from tests.cases.h100s import h100s


def test_prefill_on_every_number_of_devices():
    """XLA compiles the kernel's PTX, copies no cache, and needs no collective; all warps are launched."""
    made = []
    library = _launch.jt.triton_lib.triton_kernel_call_lib

    def kernel(name, num_warps, *rest):
        made.append((name, num_warps))
        return make(name, num_warps, *rest)

    make = library._library.TritonKernel
    for devices in (1, 8):
        mesh = h100s(devices)

        def array(shape, dtype, *spec, mesh=mesh):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

        def prefill(query, caches, tables, lens, starts):
            return jaxkv.paged_attention(query, caches, tables, lens, query_start_loc=starts)

        cache = array((1024, 16, 8, 128), "bfloat16", None, None, "tp")
        with mock.patch.object(library._library, "TritonKernel", kernel):
            lowered = jax.jit(prefill).lower(
                array((16384, 32, 128), "bfloat16", None, "tp"), (cache, cache), array((2, 512), "int32"),
                array((2,), "int32"), array((3,), "int32"),
            )  # fmt: skip
        compiled = lowered.compile()
        text = compiled.as_text()
        assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", text)) == 1
        assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
        assert compiled.memory_analysis().temp_size_in_bytes < 2**22
    assert made
    assert set(made) == {("hopper_attention_kernel", 12)}
