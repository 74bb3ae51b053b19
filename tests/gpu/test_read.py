"""Reading on a GPU: the kernels through both frameworks, near the oracle, bit for bit each other's.

Compiling is what takes the time, so that the grids are thinner than the CPU tests', which run the same kernels in
Triton's interpreter. What the compiler makes of them is seen here: each layout while decoding, and where rows are many
those that lie differently in memory; each pair of dtypes for few and for many rows; each head size and each group, with
and without quantisation; each meaning of the mask; positions that are split, and that are not.
"""

from itertools import product

import numpy as np
import pytest

from kvcore.layout import CONSTANTS as LAYOUTS
from tests.cases.gathers import assert_gathers, gather_jax, gather_torch
from tests.cases.gpu import DEVICE, HAS_GPU, captured, needs_gpu, params, shorter
from tests.cases.gpu_reads import GATHERS, KERNELS, PORTABLE, assert_kernels
from tests.cases.layouts import VLLM
from tests.cases.reads import BOUNDS, CASTS, LENGTHS, MEANINGS, assert_near_oracle, attend_torch, make_read, oracle

pytestmark = pytest.mark.gpu

IN_LAYOUTS = [*product(LAYOUTS, [False], [1]), *product(("NHD", "HEAD_MAJOR", "PALLAS", "MLA"), [True], [None])]
IN_LAYOUTS += product([VLLM[name] for name in ("LHBNC", "BLHNC", "BHLNC")], [False, True], [1])


@pytest.mark.parametrize(
    ("layout", "ragged", "layer"),
    params(IN_LAYOUTS, smoke=(("NHD", True, None), ("HEAD_MAJOR", False, 1), ("MLA", False, 1))),
)
def test_layouts(layout, ragged, layer):
    case = make_read(
        np.random.default_rng(0), layout=layout, dtype="bfloat16", seq_lens=shorter((0, 1, 700, 129)), block_size=16,
        head_size=64, query_lens=shorter((0, 1, 150, 70) if ragged else None), num_layers=None if layer is None else 3,
        layer=layer,
    )  # fmt: skip
    assert_kernels(case, KERNELS | PORTABLE)


ALL_CASTS = [*CASTS, ("float32", "float32", "auto", None), ("float16", None, "fp8", "uint8")]
SOME_CASTS = [CASTS[0], CASTS[2], CASTS[4]]  # as stored, widened, quantised
OF_DTYPES = [(*side, *cast) for side, cast in product(product(["NHD"], [False, True]), ALL_CASTS)]
OF_DTYPES += [("HEAD_MAJOR", cast != CASTS[4], *cast) for cast in SOME_CASTS]
OF_DTYPES += [("MLA", cast == CASTS[4], *cast) for cast in SOME_CASTS]


@pytest.mark.parametrize(
    ("layout", "ragged", "dtype", "cache_dtype", "kv_cache_dtype", "storage"),
    params(OF_DTYPES, smoke=[("NHD", ragged, *CASTS[i]) for ragged in (False, True) for i in (0, 4)]),
)
def test_dtypes(layout, ragged, dtype, cache_dtype, kv_cache_dtype, storage):
    case = make_read(
        np.random.default_rng(1), layout=layout, dtype=dtype, cache_dtype=cache_dtype, kv_cache_dtype=kv_cache_dtype,
        storage=storage, query_lens=shorter((1, 0, 30, 200) if ragged else None), seq_lens=shorter((1, 0, 300, 333)),
        head_size=128,
    )  # fmt: skip
    assert_kernels(case)


@pytest.mark.xdist_group("lengths")
@pytest.mark.parametrize(("lengths", "dtype"), [*product(LENGTHS, ["bfloat16"]), ("mixed", "float32")])
def test_lengths(lengths, dtype):
    assert_kernels(make_read(np.random.default_rng(2), dtype=dtype, **LENGTHS[lengths]))


@pytest.mark.parametrize(
    ("meaning", "ragged"),
    params(
        [*product(("plain", "not causal", "window of one", "scale of zero", "all"), [False]),
         *product(("not causal", "window", "cap", "negative scale", "all"), [True])],
        smoke=(("all", False), ("window", True)),
    ),
)  # fmt: skip
def test_meanings(meaning, ragged):
    query_lens = shorter((2, 0, 50, 300) if ragged else None)
    case = make_read(
        np.random.default_rng(3), dtype="bfloat16", query_lens=query_lens, seq_lens=shorter((2, 1, 90, 300)),
        head_size=64, **MEANINGS[meaning],
    )  # fmt: skip
    case.options["sinks"] = np.random.default_rng(3).standard_normal(4).astype(np.float32)
    assert_kernels(case)


@pytest.mark.parametrize(
    ("head_size", "group", "kv_cache_dtype"),
    [(64, 1, "auto"), (80, 3, "auto"), (96, 4, "auto"), (128, 8, "auto"), (192, 20, "auto"), (256, 1, "auto"),
     (64, 4, "fp8"), (80, 8, "fp8"), (96, 20, "fp8"), (128, 1, "fp8"), (192, 3, "fp8"), (256, 4, "fp8")],
)  # fmt: skip
def test_groups_and_heads(head_size, group, kv_cache_dtype):
    rng = np.random.default_rng(4)
    for query_lens in (None, shorter((1, 5, 64))):
        case = make_read(
            rng, dtype="bfloat16", group=group, head_size=head_size, num_heads=2, seq_lens=shorter((1, 300, 64)),
            query_lens=query_lens, block_size=16, kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        assert_kernels(case)


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("queries", [1, 20])
def test_latent_attention(queries, kv_cache_dtype):
    case = make_read(
        np.random.default_rng(5), layout="MLA", dtype="bfloat16", group=128, head_size=576, head_size_v=512,
        seq_lens=shorter((100, 333)), query_lens=shorter((queries, queries), 2), block_size=64,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    assert_kernels(case)


@pytest.mark.gpu_smoke
def test_thousands_of_positions():
    rng = np.random.default_rng(6)
    for options in (dict(), dict(query_lens=(1, 40)), dict(sliding_window=1000)):
        case = make_read(rng, dtype="bfloat16", head_size=64, num_heads=1, group=4, seq_lens=(5000, 3001), **options)
        assert_kernels(case)


def test_no_worse_than_torch():
    """At most a quarter more error than scaled_dot_product_attention has on the same keys and values."""
    import torch

    import torchkv

    rng = np.random.default_rng(7)
    case = make_read(
        rng, dtype="bfloat16", head_size=128, num_heads=2, group=4, seq_lens=(2048,) * 4, block_size=16, spare=0
    )
    want, _ = oracle(case)
    caches = [torch.from_numpy(c.view(np.int16)).to(DEVICE).view(torch.bfloat16) for c in case.caches]
    tables, lens = torch.from_numpy(case.block_tables).to(DEVICE), torch.from_numpy(case.seq_lens).to(DEVICE)
    key, value = torchkv.gather_kv(caches, tables, lens, 2048)
    query = torch.from_numpy(case.query.view(np.int16)).to(DEVICE).view(torch.bfloat16)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], key.transpose(1, 2), value.transpose(1, 2), enable_gqa=True
    )[:, :, 0]
    ours = torchkv.paged_attention(query, caches, tables, lens)

    def error(out):
        return np.abs(out.double().cpu().numpy() - want).max() / np.abs(want).max()

    assert error(ours) <= BOUNDS["bfloat16"]
    assert error(ours) <= 1.25 * error(theirs)


CONVERSIONS = [
    ("bfloat16", "auto", "bfloat16"), (None, "fp8", "bfloat16"), ("float32", "auto", "bfloat16"),
    (None, "fp8_e5m2", "float16"), ("bfloat16", "auto", "float32"),
]  # fmt: skip
GATHERED = [(layout, *c) for layout in LAYOUTS for c in (CONVERSIONS if layout == "NHD" else CONVERSIONS[:2])]


@pytest.mark.parametrize(
    ("layout", "cache_dtype", "kv_cache_dtype", "dtype"),
    params(GATHERED, smoke=[("HEAD_MAJOR", *c) for c in CONVERSIONS[:2]]),
)
def test_gather(layout, cache_dtype, kv_cache_dtype, dtype):
    case = make_read(
        np.random.default_rng(8), layout=layout, cache_dtype=cache_dtype, kv_cache_dtype=kv_cache_dtype, head_size=40,
        seq_lens=shorter((0, 1, 50, 130)), block_size=16, scales=(0.37, 3.0),
    )  # fmt: skip
    assert_gathers(case, 131, dtype, GATHERS)


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_gather_of_every_fp8_number(kv_cache_dtype):
    case = make_read(
        np.random.default_rng(4), kv_cache_dtype=kv_cache_dtype, storage="uint8", block_size=16, seq_lens=(16,),
        num_heads=1, head_size=16, spare=0, scales=(1.0, 0.3),
    )  # fmt: skip
    for cache in case.caches:
        cache[...] = np.arange(256, dtype=np.uint8).reshape(cache.shape)
    for dtype in ("float32", "float16", "bfloat16"):
        assert_gathers(case, 16, dtype, GATHERS)


@pytest.mark.gpu_smoke
def test_a_decode_step_in_a_cuda_graph():
    """Written and attended in a graph, replayed with longer sequences: nothing depends on lengths."""
    import torch

    import torchkv

    cache = torchkv.PagedKVCache.create(
        num_layers=2, num_blocks=64, block_size=16, num_heads=2, head_size=64, device=DEVICE, layout="HND"
    )
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device=DEVICE, generator=generator, dtype=torch.bfloat16)

    tables = torch.randperm(64, device=DEVICE, generator=generator).view(4, 16).int()
    steps = 100 if HAS_GPU else 20
    history = normal(2, 4, steps, 2, 64)
    key, value, query = normal(4, 2, 64), normal(4, 2, 64), normal(4, 8, 64)
    lens = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(4, device=DEVICE)

    def step():
        position = (lens - 1).long()
        slots = tables[rows, position // 16].long() * 16 + position % 16
        cache.write(key, value, slots, layer=1)
        return cache.attend(query, tables, lens, layer=1)

    lens += 1
    out, replay = captured(step)
    lens.zero_()
    for n in range(steps):
        key.copy_(history[0, :, n])
        value.copy_(history[1, :, n])
        lens += 1
        replay()
    q, k, v = query.view(4, 2, 4, 64).float(), *(h.transpose(1, 2).float() for h in history)
    want = torch.softmax(torch.einsum("bhgd,bhnd->bhgn", q, k) / 8, -1) @ v
    torch.testing.assert_close(out.float(), want.reshape(4, 8, 64), atol=2e-2, rtol=2e-2)


def test_torch_compile_and_opcheck():
    import torch

    import torchkv

    case = make_read(np.random.default_rng(9), dtype="bfloat16", head_size=64, seq_lens=(5, 40), query_lens=(2, 7))
    from tests.cases.arrays import to_torch

    query, tables, lens, starts = (
        to_torch(a.copy(), DEVICE) for a in (case.query, case.block_tables, case.seq_lens, case.query_start_loc)
    )
    caches = [to_torch(c.copy(), DEVICE) for c in case.caches]

    def attend(query):
        return torchkv.paged_attention(query * 2, caches, tables, lens, query_start_loc=starts) + 1

    want = attend(query)
    needs_gpu()
    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(query), want)


# ---- several GPUs


def test_another_current_device():
    import torch

    case = make_read(np.random.default_rng(10), dtype="bfloat16", query_lens=(0, 1, 3, 7))
    if torch.cuda.device_count() < 2:
        assert_near_oracle(case, {"torch": lambda case: attend_torch(case, "torch")})
        assert_gathers(case, 19, "bfloat16", {"torch": lambda *x: gather_torch(*x, "torch")})
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)  # JAX may have left another one current
    for device in ("cuda:1", "cuda:0"):
        assert_near_oracle(case, {device: lambda case, device=device: attend_torch(case, device=device)})
        assert_gathers(case, 19, "bfloat16", {device: lambda *x, device=device: gather_torch(*x, device=device)})
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_heads_over_all_gpus(kind):
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxkv

    mesh = jax.make_mesh((jax.device_count(),), ("tp",), axis_types=(getattr(AxisType, kind),))
    case = make_read(np.random.default_rng(11), num_heads=4 * jax.device_count(), group=2)
    rows, cache = (NamedSharding(mesh, P(*[None] * n, "tp")) for n in (1, 2))
    whole = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        query = jax.device_put(case.query, rows)
        caches = tuple(jax.device_put(c, cache) for c in case.caches)
        tables, lens = (jax.device_put(x, whole) for x in (case.block_tables, case.seq_lens))
        attend = jax.jit(lambda q, c, t, n: jaxkv.paged_attention(q, c, t, n, return_lse=True))
        compiled = attend.lower(query, caches, tables, lens).compile()
        out, lse = compiled(query, caches, tables, lens)
        key, _ = jax.jit(lambda c, t, n: jaxkv.gather_kv(c, t, n, 19))(caches, tables, lens)
    assert "all-gather" not in compiled.as_text()
    assert out.sharding.spec[1] == "tp"
    assert_near_oracle(case, {"sharded": lambda _: (np.asarray(out), np.asarray(lse))})
    np.testing.assert_array_equal(key, gather_jax(case, 19, "float32")[0])


def test_query_heads_that_share_one_kv_head_over_all_gpus():
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxkv

    mesh = jax.make_mesh((jax.device_count(),), ("tp",), axis_types=(AxisType.Auto,))
    case = make_read(np.random.default_rng(12), layout="MLA", group=16, head_size=64, head_size_v=32)
    query = jax.device_put(case.query, NamedSharding(mesh, P(None, "tp")))
    rest = [jax.device_put(x, NamedSharding(mesh, P())) for x in (case.caches[0], case.block_tables, case.seq_lens)]
    out, lse = jax.jit(lambda q, *x: jaxkv.paged_attention(q, *x, head_size_v=32, return_lse=True))(query, *rest)
    assert_near_oracle(case, {"sharded": lambda _: (np.asarray(out), np.asarray(lse))})


def test_parts_of_a_context_on_all_gpus():
    """Context parallelism: each GPU has blocks of its own, the log-sum-exps join the results."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import jaxkv

    gpus = jax.device_count()
    case = make_read(np.random.default_rng(13), seq_lens=(64 * gpus, 32 * gpus), block_size=16, spare=0)
    want, want_lse = oracle(case)
    tables, local_tables = case.block_tables, np.full((gpus, 2, 4), -1, np.int32)
    caches = [[], []]
    lens = np.zeros((gpus, 2), np.int32)
    for device in range(gpus):  # each has every sequence's blocks device, device + gpus, …
        ids = []
        for seq in range(2):
            mine = tables[seq, device : case.seq_lens[seq] // 16 : gpus]
            local_tables[device, seq, : len(mine)] = len(ids) + np.arange(len(mine))
            lens[device, seq] = 16 * len(mine)
            ids += mine.tolist()
        for parts, cache in zip(caches, case.caches, strict=True):
            parts.append(cache[ids])
    mesh = jax.make_mesh((gpus,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(query, key_cache, value_cache, tables, lens):
        part = jaxkv.paged_attention(
            query, (key_cache[0], value_cache[0]), tables[0], lens[0], causal=False, return_lse=True
        )
        return jaxkv.merge_attention(*(jax.lax.all_gather(x, "cp") for x in part))

    split, whole = P("cp"), P()
    attend = jax.shard_map(
        local, mesh=mesh, in_specs=(whole, split, split, split, split), out_specs=(whole, whole), check_vma=False
    )
    out, lse = jax.jit(attend)(case.query, *(jnp.stack(parts) for parts in caches), local_tables, lens)
    np.testing.assert_allclose(out, want, atol=1e-4)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)
