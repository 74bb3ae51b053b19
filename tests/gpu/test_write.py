"""On a GPU: the kernels through both frameworks, bit for bit the oracle's; streams, graphs, compilers, big offsets.

Compiling is what takes the time, so that the grids are thinner than the CPU tests', which run the same kernels in
Triton's interpreter. What the compiler makes of them is seen here: every pair of values of vLLM's grid, each layout
with a copy into a layer and with a conversion, each conversion in one layout, each pair of dtypes. Tests that share
kernels run in one process: they have an `xdist_group`.
"""

from itertools import islice, product

import numpy as np
import pytest

from tests.cases import gpu
from tests.cases.arrays import (
    LAYOUTS,
    assert_equals_oracle,
    bits,
    from_torch,
    make_case,
    run_jax,
    run_oracle,
    run_torch,
    to_torch,
)
from tests.cases.gpu import DEVICE, HAS_GPU, needs_gpu, params
from tests.cases.write_grid import (
    BLOCK_SIZES,
    CONVERSIONS,
    DTYPES,
    HEAD_SIZES,
    KV_CACHE_DTYPES,
    SLOTS,
    grid_cases,
    layout_case,
)

pytestmark = pytest.mark.gpu

KERNELS = {"jax triton": run_jax, "torch triton": lambda case: run_torch(case, device="cuda")}
PORTABLE = {"jax xla": lambda case: run_jax(case, "xla"), "torch": lambda case: run_torch(case, "torch", "cuda")}
GPU_IMPLEMENTATIONS = KERNELS if HAS_GPU else {"all but the kernels": gpu.write}
ALL_IMPLEMENTATIONS = GPU_IMPLEMENTATIONS | (PORTABLE if HAS_GPU else {})


# Any two of the four values meet; each test has all three numbers of heads, with a number of tokens each.
GRID = [
    (head_size, block_size, DTYPES[(i + j) % 3], KV_CACHE_DTYPES[(i + 2 * j) % 3], (i + j) % 4)
    for (i, head_size), (j, block_size) in product(enumerate(HEAD_SIZES), enumerate(BLOCK_SIZES))
]


@pytest.mark.parametrize(
    ("head_size", "block_size", "dtype", "kv_cache_dtype", "first"), params(GRID, smoke=(GRID[0], GRID[10]))
)
def test_vllm_grid(head_size, block_size, dtype, kv_cache_dtype, first):
    for case in islice(grid_cases(head_size, block_size, dtype, kv_cache_dtype), first, None, 4):
        assert_equals_oracle(case, GPU_IMPLEMENTATIONS)


IN_LAYOUTS = [
    (layout, *conversion, layer)
    for layout, (i, conversion), layer in product(LAYOUTS, enumerate(CONVERSIONS.args[1]), (None, 2))
    if layout == "NHD" or (i, layer) in ((0, 2), (2, None))
]


@pytest.mark.parametrize(
    ("layout", "dtype", "cache_dtype", "kv_cache_dtype", "layer"),
    params(IN_LAYOUTS, smoke=[c for c in IN_LAYOUTS if c[0] in ("HEAD_MAJOR", "PACKED_NHD")]),
)
def test_layouts(layout, dtype, cache_dtype, kv_cache_dtype, layer):
    assert_equals_oracle(layout_case(layout, dtype, cache_dtype, kv_cache_dtype, layer), ALL_IMPLEMENTATIONS)


@pytest.mark.xdist_group("slots")
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "PACKED_HND"])
def test_slots(layout, slots):
    assert_equals_oracle(make_case(np.random.default_rng(6), layout=layout, slots=slots), ALL_IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_casts_of_every_kind(dtype, cache_dtype):
    rng = np.random.default_rng(4)
    case = make_case(rng, num_tokens=33, head_size=128, dtype=dtype, cache_dtype=cache_dtype)
    assert_equals_oracle(case, ALL_IMPLEMENTATIONS)


@pytest.mark.xdist_group("scales")
@pytest.mark.parametrize("scales", [(None, None), (2.0, None), (1e-38, 1e38), (1e-40, 3e-45), (0.0, -0.25)])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_scales(kv_cache_dtype, scales):
    for dtype in ("float32", "bfloat16"):
        case = make_case(
            np.random.default_rng(9), dtype=dtype, kv_cache_dtype=kv_cache_dtype, num_tokens=64, num_blocks=16,
            head_size=256, scales=scales,
        )  # fmt: skip
        assert_equals_oracle(case, ALL_IMPLEMENTATIONS)


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_input_is_stored_as_it_is(stored):
    kv_cache_dtype = "fp8_e4m3" if "e4m3" in stored else "fp8_e5m2"
    case = make_case(np.random.default_rng(5), dtype=stored, cache_dtype=stored, kv_cache_dtype=kv_cache_dtype)
    assert_equals_oracle(case, ALL_IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("layout", "kv_cache_dtype"),
    [*product(["NHD"], KV_CACHE_DTYPES), *product(["HND", "HEAD_MAJOR", "PALLAS", "PACKED_NHD"], ["auto"])],
)
def test_many_tokens(layout, kv_cache_dtype):
    """Too many for the oracle: vectorised torch on the CPU stands in, which the CPU's tests hold to the oracle."""
    num_tokens, num_blocks = (5000, 700) if HAS_GPU else (50, 7)
    case = make_case(
        np.random.default_rng(2), layout=layout, num_tokens=num_tokens, num_heads=8, head_size=128,
        num_blocks=num_blocks, block_size=16, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    want = run_torch(case, "torch") if HAS_GPU else run_oracle(case)
    for name, run in GPU_IMPLEMENTATIONS.items():
        for got, cache in zip(run(case), want, strict=True):
            np.testing.assert_array_equal(bits(got), bits(cache), err_msg=name)


@pytest.mark.xdist_group("large")  # one at a time: GBs each
@pytest.mark.parametrize("layout", ["NHD", "PALLAS"])
def test_offsets_beyond_32_bits(layout):
    """A cache of more than 2³² elements; with heads outermost, already a row spans more than 2³¹."""
    import torch

    import torchkv
    from torchkv import CacheLayout

    num_blocks = 2**32 // (16 * 4 * 128) + 64 if HAS_GPU else 64
    (shape, _) = CacheLayout.of(layout).shapes(num_blocks=num_blocks, block_size=16, num_heads=4, head_size=128)
    caches = [torch.zeros(shape, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    key = torch.randint(1, 255, (6, 4, 128), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    slots = torch.tensor([0, 17, 16 * num_blocks - 1, 16 * num_blocks // 2, 16 * num_blocks, -1], device=DEVICE)
    torchkv.reshape_and_cache_flash(key, key, *caches, slots, "fp8", layout=layout)
    key = key.view(torch.uint8)
    for cache in caches:
        logical = cache if layout == "NHD" else cache.permute(1, 2, 0, 3)
        for i in range(4):
            slot = int(slots[i])
            assert (logical[slot // 16, slot % 16] == key[i]).all()
        assert sum(part.count_nonzero() for part in cache.view(-1).split(2**28)) == 4 * 4 * 128


# ---- torch


def torch_case(**options):
    case = make_case(np.random.default_rng(3), **options)
    return case, [to_torch(a.copy(), DEVICE) for a in (case.key, case.value, *case.caches, case.slot_mapping)]


def assert_caches(caches, want):
    for got, cache in zip(caches, want, strict=True):
        np.testing.assert_array_equal(bits(from_torch(got)), bits(cache))


@pytest.mark.gpu_smoke
def test_cuda_graph():
    import torch

    import torchkv

    case, (key, value, *caches, slots) = torch_case()
    want, other = run_oracle(case), make_case(np.random.default_rng(4))
    torchkv.reshape_and_cache_flash(key, value, *caches, torch.full_like(slots, -1))  # compiles
    needs_gpu()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torchkv.reshape_and_cache_flash(key, value, *caches, slots)
    assert_caches(caches, case.caches)  # capture alone writes nothing
    graph.replay()
    assert_caches(caches, want)
    for tensor, array in zip((key, value, slots), (other.key, other.value, other.slot_mapping), strict=True):
        tensor.copy_(to_torch(array))
    graph.replay()
    other.caches = want
    assert_caches(caches, run_oracle(other))


@pytest.mark.gpu_smoke
def test_current_stream():
    import torch

    import torchkv

    case, (key, value, *caches, slots) = torch_case()
    want = run_oracle(case)
    torchkv.reshape_and_cache_flash(key, value, *caches, torch.full_like(slots, -1))  # compiles
    late = key.clone()
    key.zero_()
    needs_gpu()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        key.copy_(late)  # on this stream, after the sleep
        torchkv.reshape_and_cache_flash(key, value, *caches, slots)
        done = torch.cuda.Event()
        done.record()
    assert not done.query()
    stream.synchronize()
    assert_caches(caches, want)


@pytest.mark.parametrize("offset", [0, 1])
def test_strided_and_unaligned_tensors(offset):
    import torch

    import torchkv

    case = make_case(np.random.default_rng(5), num_heads=2, head_size=64)
    qkv = torch.zeros(7, 8 * 64 + 1, dtype=torch.bfloat16, device=DEVICE)
    key, value = (qkv[:, offset + i : offset + i + 128].unflatten(1, (2, 64)) for i in (256, 384))
    key.copy_(to_torch(case.key))
    value.copy_(to_torch(case.value))
    kv = torch.stack([to_torch(c) for c in case.caches], dim=1).to(DEVICE)
    slots = to_torch(np.repeat(case.slot_mapping, 2), DEVICE)[::2]
    torchkv.reshape_and_cache_flash(key, value, *kv.unbind(1), slots)
    assert_caches(kv.unbind(1), run_oracle(case))


def test_torch_compile_has_no_clone():
    import torch

    import torchkv

    case, (key, value, *caches, slots) = torch_case()
    kv, want = torch.stack(caches), run_oracle(case)
    needs_gpu()
    from torch._inductor.utils import run_and_get_code

    @torch.compile(fullgraph=True)
    def step(key, value, kv, slots):
        torchkv.reshape_and_cache_flash(key, value, *kv.unbind(0), slots)
        return key * 2

    _, (code,) = run_and_get_code(step, key, value, kv, slots)
    assert code.count("torchkv.reshape_and_cache_flash") >= 1
    assert "clone" not in code
    assert f"empty_strided_cuda({tuple(kv.shape)}" not in code
    assert_caches(kv.unbind(0), want)


def test_launch_hooks_are_called():
    import triton

    import torchkv

    _, (key, value, *caches, slots) = torch_case()
    seen = []
    hooks = triton.knobs.runtime
    needs_gpu()

    def enter(metadata):
        seen.append(metadata.get()["name"])

    hooks.launch_enter_hook.add(enter)
    try:
        torchkv.reshape_and_cache_flash(key, value, *caches, slots)
    finally:
        hooks.launch_enter_hook.remove(enter)
    torchkv.reshape_and_cache_flash(key, value, *caches, slots)
    assert seen == ["reshape_and_cache_kernel_flash"]


@pytest.mark.gpu_smoke
def test_layer_tensors_and_scale_tensors():
    import torch

    import torchkv

    case, (key, value, *caches, slots) = torch_case(num_layers=3, layer=2, kv_cache_dtype="fp8")
    scales = [torch.tensor([s], device=DEVICE) for s in (case.k_scale, case.v_scale)]
    layer = torch.tensor(2, device=DEVICE)
    torchkv.reshape_and_cache_flash(key, value, *caches, slots, "fp8", *scales, layout=case.layout, layer=layer)
    assert_caches(caches, run_oracle(case))


def test_errors_come_before_the_launch_and_after_a_hit():
    import torchkv

    case, (key, value, *caches, slots) = torch_case()
    torchkv.reshape_and_cache_flash(key, value, *caches, slots)
    want = run_oracle(case)
    with pytest.raises(ValueError, match=r"^value must have shape \(7, 3, 40\), got \(6, 3, 40\)"):
        torchkv.reshape_and_cache_flash(key, value[:6], *caches, slots)
    with pytest.raises(ValueError, match=r"^slot_mapping must have at most num_tokens = 5 entries, got 7"):
        torchkv.reshape_and_cache_flash(key[:5], value[:5], *caches, slots)
    home, elsewhere = ("cuda:0", "cpu") if HAS_GPU else ("cpu", "meta")
    with pytest.raises(ValueError, match=rf"^value_cache must be on device {home}, as key_cache, got {elsewhere}"):
        torchkv.reshape_and_cache_flash(key, value, caches[0], caches[1].to(elsewhere), slots)
    with pytest.raises(ValueError, match=r"^key_cache and value_cache must not overlap in memory"):
        torchkv.reshape_and_cache_flash(key, value, caches[0], caches[0], slots)
    assert_caches(caches, want)


def test_another_current_device():
    import torch

    import torchkv

    case = make_case(np.random.default_rng(6))
    want = run_oracle(case)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for device in ("cuda:1", "cuda:0"):
        key, value, *caches, slots = (
            to_torch(a.copy(), device) for a in (case.key, case.value, *case.caches, case.slot_mapping)
        )
        torchkv.reshape_and_cache_flash(key, value, *caches, slots)
        assert torch.cuda.current_device() == 0
        assert_caches(caches, want)


# ---- JAX


def jax_case(**options):
    import jax.numpy as jnp

    case = make_case(np.random.default_rng(7), num_blocks=64, **options)
    return case, [jnp.asarray(a) for a in (case.key, case.value, *case.caches, case.slot_mapping)]


def assert_arrays(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(w))


@pytest.mark.parametrize(
    "options", [{}, {"kv_cache_dtype": "fp8", "cache_dtype": "float8_e4m3fn"}], ids=["bf16", "fp8"]
)
def test_jit_with_donation_updates_the_same_buffers(options):
    import jax

    import jaxkv

    case, inputs = jax_case(**options)
    step = jax.jit(
        lambda *x: jaxkv.reshape_and_cache_flash(*x, case.kv_cache_dtype, case.k_scale, case.v_scale),
        donate_argnums=(2, 3),
    )
    before = [c.unsafe_buffer_pointer() for c in inputs[2:4]]
    new = step(*inputs)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    assert_arrays(new, run_oracle(case))


@pytest.mark.parametrize("layout", ["NHD", "HND", "KV_NHD", "PACKED_NHD"])
def test_scan_over_layers_in_a_loop_over_steps(layout):
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxkv

    case, (key, value, *caches, slots) = jax_case(layout=layout, num_layers=4, layer=0)

    def decode(key, value, caches, slots):
        def one_layer(caches, layer):
            new = case.op(jaxkv)(key, value, *caches, slots, layout=case.layout, layer=layer)
            return list(new) if isinstance(new, tuple) else [new], None

        return lax.fori_loop(0, 3, lambda _, c: lax.scan(one_layer, c, jnp.arange(4))[0], caches)

    before = [c.unsafe_buffer_pointer() for c in caches]
    new = jax.jit(decode, donate_argnums=2)(key, value, caches, slots)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    for layer in range(4):
        case.layer = layer
        case.caches = run_oracle(case)
    assert_arrays(new, case.caches)


@pytest.mark.gpu_smoke
def test_refs_are_updated_in_place():
    import jax

    import jaxkv

    case, (key, value, *caches, slots) = jax_case()
    refs = [jax.new_ref(c) for c in caches]
    before = [r.unsafe_buffer_pointer() for r in refs]
    assert jaxkv.reshape_and_cache_flash(key, value, *refs, slots) is None
    assert [r.unsafe_buffer_pointer() for r in refs] == before
    assert_arrays([r[...] for r in refs], run_oracle(case))


@pytest.mark.parametrize("layout", ["NHD", "PALLAS"])
def test_vmap(layout):
    import jax
    import jax.numpy as jnp

    import jaxkv

    cases = [make_case(np.random.default_rng(i), layout=layout) for i in range(3)]
    batch = [
        jnp.stack([jnp.asarray(a) for a in arrays])
        for arrays in zip(*((c.key, c.value, *c.caches, c.slot_mapping) for c in cases), strict=True)
    ]
    new = jax.vmap(lambda *x: jaxkv.reshape_and_cache_flash(*x, layout=layout))(*batch)
    assert_arrays(new, [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])


def test_export_and_call():
    import jax

    import jaxkv

    case, inputs = jax_case()
    exported = jax.export.export(
        jax.jit(jaxkv.reshape_and_cache_flash),
        platforms=["cuda" if HAS_GPU else "cpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")],
    )(*inputs)
    assert_arrays(exported.call(*inputs), run_oracle(case))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_heads_over_all_gpus(kind):
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxkv

    gpus = jax.device_count()
    mesh = jax.make_mesh((gpus,), ("tp",), axis_types=(getattr(AxisType, kind),))
    case = make_case(np.random.default_rng(8), num_heads=4 * gpus)
    rows, cache = (NamedSharding(mesh, P(*[None] * n, "tp", None)) for n in (1, 2))
    with jax.set_mesh(mesh):
        inputs = [
            jax.device_put(a, s) for a, s in ((case.key, rows), (case.value, rows), *((c, cache) for c in case.caches))
        ]
        slots = jax.device_put(case.slot_mapping.astype(np.int32), NamedSharding(mesh, P(None)))
        new = jax.jit(jaxkv.reshape_and_cache_flash, donate_argnums=(2, 3))(*inputs, slots)
    assert_arrays(new, run_oracle(case))


@pytest.mark.gpu_smoke
def test_both_frameworks_share_one_cache():
    """torch writes through DLPack into the buffer that JAX made, and the other way round."""
    import jax.numpy as jnp
    import torch

    import jaxkv
    import torchkv

    case, (key, value, *caches, slots) = jax_case()
    shared = [torch.from_dlpack(c) for c in caches]
    torchkv.reshape_and_cache_flash(*map(torch.from_dlpack, (key, value)), *shared, torch.from_dlpack(slots))
    if HAS_GPU:
        torch.cuda.synchronize()
    assert_caches(shared, run_oracle(case))
    back = [jnp.from_dlpack(c) for c in shared]
    assert_arrays(jaxkv.reshape_and_cache_flash(key, value, *back, slots), run_oracle(case))
