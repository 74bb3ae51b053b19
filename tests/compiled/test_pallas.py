"""H100 programs of Pallas's functions, compiled without a GPU: pages are read where they are."""

import math
import re

import pytest

pytestmark = pytest.mark.compiled
pytest.importorskip("jax_cuda13_plugin")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv.integrations import pallas
from tests.cases.h100s import h100s

BATCH, Q_HEADS, HEADS, HEAD_SIZE, PAGES, PAGE = 64, 32, 8, 128, 4096, 16


def array(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def assert_read_in_place(compiled, *pages):
    """Nothing of the size of pages is allocated, nor communicated."""
    text, size = compiled.as_text(), math.prod(pages[0].shape) * jnp.dtype(pages[0].dtype).itemsize
    assert len(re.findall(r"custom-call\(.*triton_kernel_call_ffi", text)) >= 1
    assert compiled.memory_analysis().temp_size_in_bytes < size // 20
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decode(dtype, devices):
    mesh = h100s(devices)
    pages = array(mesh, (HEADS, PAGES, PAGE, HEAD_SIZE), dtype, "tp")
    scales = [array(mesh, (HEADS, PAGES, PAGE), "float32", "tp")] * 2 if dtype == "int8" else []
    arguments = [array(mesh, (BATCH, Q_HEADS, HEAD_SIZE), "bfloat16", None, "tp"), pages, pages]
    arguments += [array(mesh, (BATCH, 512), "int32"), array(mesh, (BATCH,), "int32"), *scales]
    assert_read_in_place(jax.jit(pallas.paged_attention).lower(*arguments).compile(), pages)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_ragged(dtype, devices):
    mesh = h100s(devices)
    pages = array(mesh, (PAGES, PAGE, 2 * HEADS, HEAD_SIZE), dtype, None, None, "tp")
    arguments = [array(mesh, (512, Q_HEADS, HEAD_SIZE), "bfloat16", None, "tp"), pages]
    arguments += [array(mesh, shape, "int32") for shape in ((BATCH,), (BATCH, 512), (BATCH + 1,), (1,))]
    call = jax.jit(lambda *arrays: pallas.ragged_paged_attention(*arrays, sm_scale=0.1, k_scale=0.5, v_scale=0.5))
    assert_read_in_place(call.lower(*arguments).compile(), pages)
