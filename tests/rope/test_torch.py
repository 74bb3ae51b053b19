"""torchkv.rope_and_cache, bit for bit as the oracle: in torch's own operations, and in Triton's interpreter."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import torchkv
from tests.cases.arrays import from_torch, random_normal, to_torch
from tests.cases.bad_ropes import BAD, BEYOND, valid
from tests.cases.rope import CASES, RopeCase, run_oracle
from tests.cases.torch_ropes import BY_NAME, assert_same, caches_of, fresh, rotate, run_torch

BACKENDS = pytest.mark.parametrize("backend", ["torch", "interpret"])

# What the call of the kernel depends on: the interpreter runs all cases in the tests of JAX.
INTERPRETED = [
    "gptj, head_size 80, 24 of it", "neox, head_size 7, 6 of it", "1 query head, 3 heads", "norms",
    "norm of query alone, no eps", "norm of key alone, large eps", "1 token without a layout", "no token",
    "fewer slots than tokens", "no slots", "positions outside", "mrope", "mrope, gptj, 8 of 40",
    "float32 into bfloat16", "table in bfloat16", "HEAD_MAJOR by its axes", "one array without a layout",
    "INTERLEAVED", "NHD of all layers", "fp8_e4m3, scales of heads", "fp8_e4m3, scales of layers and heads",
    "nvfp4, PACKED_HND, float32",
    "int8 by token and head", "int4 by token and head, PACKED_NHD", "MLA without a layout, neox, normed",
    "MLA, blocks within slots", "MLA, fp8_e4m3", "MLA, fp8_ds_mla of all layers, normed",
]  # fmt: skip
RUNS = [(case.name, "torch") for case in CASES] + [(name, "interpret") for name in INTERPRETED]


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_cases(name, backend):
    call = BY_NAME[name].make()
    assert_same(run_torch(call, backend=backend), run_oracle(call))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_bits(dtype):
    for seed, name in enumerate(("norms", "mrope", "MLA", "fp8_e4m3", "int8 by token and head")):
        rng = np.random.default_rng([seed, len(dtype)])
        call = replace(BY_NAME[name], dtype=dtype, num_tokens=40, slots=None, positions=None).make()
        for x in ("query", "key", "value"):
            array = getattr(call, x)
            setattr(call, x, np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape))
        assert_same(run_torch(call), run_oracle(call))


@BACKENDS
def test_an_empty_table_makes_zeros(backend):
    call = CASES[0].make()
    call.cos_sin = call.cos_sin[:0]
    query, *_ = want = run_oracle(call)
    assert not query.any()
    assert_same(run_torch(call, backend=backend), want)


def test_square_roots_are_rounded_correctly():
    """torch's own of float32, on CPUs, are not: MKL's are a bit off for one number in twenty."""
    call = RopeCase("roots", num_tokens=40, num_q_heads=64, head_size=2, dtype="float32", q_weights="float32").make()
    assert_same(run_torch(call), run_oracle(call))


# ---- tensors with strides


def fused(rng, sizes, tokens=7, size=16, dtype="bfloat16"):
    """Heads that are parts of one projection."""
    whole = to_torch(random_normal(rng, (tokens, sum(sizes) * size), dtype))
    return [part.unflatten(1, (-1, size)) for part in whole.split([n * size for n in sizes], dim=1)]


@BACKENDS
@pytest.mark.parametrize("rope", ["neox", "gptj"])
def test_slices_of_a_fused_projection(rope, backend, rng):
    call = replace(BY_NAME["norms"], rope=rope).make()
    rows = fused(rng, (8, 2, 2))
    call.query, call.key, call.value = (from_torch(x).copy() for x in rows)
    want = run_oracle(call)

    def run(_query, _key, _value, *rest, **options):
        return torchkv.rope_and_cache(*rows, *rest, **options)

    before, caches = [x.clone() for x in rows], caches_of(call)
    out = call(run, fresh, caches, backend=backend)
    assert out.is_contiguous()
    assert_same([out, *caches], want)
    assert all(map(torch.equal, rows, before))


STRIDED = {
    "heads first": ((8, 7, 16), lambda room: room.transpose(0, 1)),
    "dims first": ((16, 8, 7), lambda room: room.permute(2, 1, 0)),
    "every other element": ((7, 8, 32), lambda room: room[..., 1::2]),
    "part of a projection": ((7, 12, 16), lambda room: room[:, 3:11]),
    "every other token": ((14, 8, 16), lambda room: room[1::2]),
}


@BACKENDS
@pytest.mark.parametrize(("shape", "view"), STRIDED.values(), ids=STRIDED)
def test_strided_out(shape, view, backend):
    call = BY_NAME["norms"].make()
    room = torch.full(shape, 7.0, dtype=torch.bfloat16)
    out, caches = view(room), caches_of(call)
    assert rotate(call, caches, out=out, backend=backend) is out
    want = run_oracle(call)
    assert_same([out, *caches], want)
    other = torch.full_like(room, 7.0)  # nothing beside it was written
    view(other).copy_(to_torch(want[0]))
    assert torch.equal(room, other)


@BACKENDS
@pytest.mark.parametrize("name", ["norms", "gptj, head_size 80, 24 of it", "MLA", "positions outside"])
@pytest.mark.parametrize("same", [lambda q: q, lambda q: q.view(q.shape)], ids=["itself", "a view"])
def test_query_may_be_rotated_where_it_is(same, name, backend):
    call = BY_NAME[name].make()
    query, caches = fresh(call.query), caches_of(call)

    def run(_, *rest, **options):
        return torchkv.rope_and_cache(query, *rest, out=same(query), **options)

    out = call(run, fresh, caches, backend=backend)
    assert out.data_ptr() == query.data_ptr()
    assert_same([query, *caches], run_oracle(call))


@BACKENDS
def test_query_of_a_projection_may_be_rotated_where_it_is(backend, rng):
    call = BY_NAME["norms"].make()
    rows = fused(rng, (8, 2, 2))
    call.query, call.key, call.value = (from_torch(x).copy() for x in rows)
    before, caches = [x.clone() for x in rows[1:]], caches_of(call)

    def run(_query, _key, _value, *rest, **options):
        return torchkv.rope_and_cache(*rows, *rest, out=rows[0], **options)

    assert call(run, fresh, caches, backend=backend) is rows[0]
    assert_same([rows[0], *caches], run_oracle(call))
    assert all(map(torch.equal, rows[1:], before))


BAD_OUT = {
    "shape": (lambda q, k, c: q[:5].clone(), ValueError, "out must have shape (7, 8, 16), got (5, 8, 16)"),
    "dtype": (lambda q, k, c: q.float(), TypeError, "out must have dtype bfloat16, got float32"),
    "device": (lambda q, k, c: q.to("meta"), ValueError, "out must be on device cpu, as query, got meta"),
    "no tensor": (lambda q, k, c: [0.0], TypeError, "out must be a torch.Tensor, got list"),
    "one head for all": (
        lambda q, k, c: q[:, :1].clone().expand_as(q), ValueError,
        "out must not overlap itself in memory, got strides (16, 0, 1)",
    ),
    "tokens over each other": (
        lambda q, k, c: q.new_zeros(2000).as_strided((7, 8, 16), (16, 16, 1)), ValueError,
        "out must not overlap itself in memory, got strides (16, 16, 1)",
    ),
    "a token later": (
        lambda q, k, c: q._base[1:], ValueError, "out and query must not overlap in memory",
    ),
    "query in another order": (
        lambda q, k, c: q.as_strided((7, 8, 16), (16, 7 * 16, 1)), ValueError,
        "out and query must not overlap in memory",
    ),
    "key": (
        lambda q, k, c: k._base.view(-1)[8:904].view(7, 8, 16), ValueError, "out and key must not overlap in memory",
    ),
    "value_cache": (
        lambda q, k, c: c[1].view(-1)[:896].view(7, 8, 16), ValueError,
        "out and value_cache must not overlap in memory",
    ),
}  # fmt: skip


@BACKENDS
@pytest.mark.parametrize(("make", "error", "text"), BAD_OUT.values(), ids=BAD_OUT)
def test_bad_out(make, error, text, backend, rng):
    call = BY_NAME["slots outside"].make()
    query = to_torch(random_normal(rng, (8, 8, 16), "bfloat16"))[:7]
    key = to_torch(random_normal(rng, (30, 2, 16), "bfloat16"))[:7]
    caches = caches_of(call)
    before = [x.clone() for x in (query, key, *caches)]

    def run(_query, _key, *rest, **options):
        return torchkv.rope_and_cache(query, key, *rest, out=make(query, key, caches), **options)

    with pytest.raises(error) as caught:
        call(run, fresh, caches, backend=backend)
    assert str(caught.value) == text
    for now, then in zip((query, key, *caches), before, strict=True):
        assert torch.equal(now.view(torch.int16), then.view(torch.int16))


def test_out_may_lie_between_what_is_read():
    """In one buffer with query, key and value, of which it touches no element."""
    call = BY_NAME["norms"].make()
    room = torch.full((7, 20, 16), 7.0, dtype=torch.bfloat16)
    rows = room[:, :8], room[:, 8:10], room[:, 10:12]
    for tensor, array in zip(rows, (call.query, call.key, call.value), strict=True):
        tensor.copy_(to_torch(array))
    caches = caches_of(call)
    out = call(
        lambda _q, _k, _v, *rest, **options: torchkv.rope_and_cache(*rows, *rest, out=room[:, 12:], **options),
        fresh, caches,
    )  # fmt: skip
    assert_same([out, *caches], run_oracle(call))


# ---- caches


def test_one_array_need_not_be_in_a_tuple():
    call = BY_NAME["PACKED_NHD"].make()
    (cache,) = caches_of(call)
    out = call(lambda q, k, v, _, *rest, **options: torchkv.rope_and_cache(q, k, v, cache, *rest, **options), fresh, [])
    assert_same([out, cache], run_oracle(call))


CACHES = {
    "two arrays": ({"layout": "HND", "num_layers": 2}, "auto"),
    "one array": ({"layout": "PACKED_HND", "head_size_v": 8}, "auto"),
    "static scales": ({"kv_cache_dtype": "fp8", "k_scale": 0.5, "v_scale": 2.0}, "fp8"),
    "computed scales": ({"kv_cache_dtype": "int8", "per_token_head": True, "num_layers": 2}, "int8"),
    "computed scales, one array": ({"kv_cache_dtype": "int4", "per_token_head": True, "layout": "PACKED_NHD"}, "int4"),
    "latent": ({"layout": "MLA", "num_heads": 1, "head_size": 48, "head_size_v": 32}, "auto"),
    "latent, fp8": (
        {"layout": "MLA", "num_heads": 1, "head_size": 48, "head_size_v": 32, "kv_cache_dtype": "fp8", "k_scale": 0.5},
        "fp8",
    ),
}


@BACKENDS
@pytest.mark.parametrize(("options", "kv_cache_dtype"), CACHES.values(), ids=CACHES)
def test_a_method_of_a_cache(options, kv_cache_dtype, backend, rng):
    sizes = dict(num_blocks=4, block_size=4, num_heads=2, head_size=16) | options
    cache = torchkv.PagedKVCache.create(**sizes)
    spec, layer = cache.spec, 1 if cache.spec.num_layers else None
    rank = spec.head_size_v
    shapes = ((5, 6, 16), (5, 2, 16), (5, 2, rank))
    if spec.layout.latent:
        shapes = ((5, 6, 16), (5, rank), (5, spec.head_size - rank))
    rows = [random_normal(rng, shape, "bfloat16") for shape in shapes]
    rest = np.array([3, 0, 9, -1, 2]), random_normal(rng, (10, 8), "float32"), np.array([3, -1, 15, 0])
    weights = {"q_norm": np.float32([1.5] * 16), "k_norm": np.float32([0.5] * rows[1].shape[-1])}
    numbers = {"rope": "gptj", "rotary_dim": 8, "eps": 1e-5}
    k_scale, v_scale = (cache.k_scale, cache.v_scale) if spec.scale_layout is None else (None, None)
    scale_caches = () if spec.scale_layout is None else (cache.k_scale, cache.v_scale)
    memory = [x.clone() for x in (*cache.caches, *scale_caches)]
    want = torchkv.rope_and_cache(
        *map(to_torch, rows), memory, *map(to_torch, rest), **numbers, **{n: to_torch(w) for n, w in weights.items()},
        kv_cache_dtype=kv_cache_dtype, k_scale=k_scale, v_scale=v_scale, layout=spec.layout, layer=layer,
    )  # fmt: skip
    out = torch.empty(shapes[0], dtype=torch.bfloat16)
    got = cache.rope_and_cache(
        *map(to_torch, (*rows, *rest)), **numbers, **{n: to_torch(w) for n, w in weights.items()}, layer=layer, out=out,
        backend=backend,
    )  # fmt: skip
    assert got is out
    assert torch.equal(got, want)
    for a, b in zip((*cache.caches, *scale_caches), memory, strict=True):
        assert torch.equal(a, b)
        assert a.any()


# ---- bad calls


def as_torch(x):
    if isinstance(x, np.ndarray):
        return fresh(x)
    return [fresh(y) if isinstance(y, np.ndarray) else y for y in x] if isinstance(x, list) else x


@BACKENDS
@pytest.mark.parametrize(("kind", "changes", "error", "text"), BAD.values(), ids=BAD)
def test_bad_calls(kind, changes, error, text, backend):
    arguments = {"backend": backend} | valid(kind) | changes
    given = {name: as_torch(x) for name, x in arguments.items()}
    before = [from_torch(cache).copy() for cache in given["caches"]]
    with pytest.raises(error) as caught:
        torchkv.rope_and_cache(**given)
    assert str(caught.value) == (text or "backend must be None, 'triton', 'torch' or 'interpret', got 'cuda'")
    assert_same(given["caches"], before)


@pytest.mark.parametrize("kind", ["two arrays", "one array", "scales", "latent"])
def test_what_they_differ_from_is_right(kind):
    out = torchkv.rope_and_cache(**{name: as_torch(x) for name, x in valid(kind).items()})
    assert out.shape == (5, 6, 16)


@pytest.mark.parametrize("changes", [changes for changes, _ in BEYOND.values()], ids=BEYOND)
def test_positions_beyond_the_table_are_zeros(changes):
    """In tensors nothing looks at them before the kernel does."""
    given = {name: as_torch(x) for name, x in (valid() | changes).items()}
    out, positions = torchkv.rope_and_cache(**given), given["positions"].reshape(-1, 5)
    outside = ((positions < 0) | (positions >= len(given["cos_sin"]))).any(0)
    assert outside.any()
    assert not out[outside].any()
    assert out[~outside].flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["query", "key", "value", "positions", "cos_sin", "slot_mapping", "q_norm", "k_norm"])
def test_what_is_no_tensor_is_one_line(name):
    given = {n: as_torch(x) for n, x in valid().items()} | {n: torch.ones(16) for n in ("q_norm", "k_norm")}
    optional = "None or " if "norm" in name else ""
    for wrong, word in (([1.0], "list"), (np.ones(16), "ndarray")):
        for out in (None, torch.empty_like(given["query"])):
            with pytest.raises(TypeError) as caught:
                torchkv.rope_and_cache(**given | {name: wrong, "out": out})
            optional = "" if out is not None and name == "query" else optional
            assert str(caught.value) == f"{name} must be {optional}a torch.Tensor, got {word}"
    if not optional:
        for out in (None, torch.empty_like(given["query"])):
            with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got None(Type)?$"):
                torchkv.rope_and_cache(**given | {name: None, "out": out})


@pytest.mark.parametrize(("caches", "text"), [
    (None, "caches must be a torch.Tensor or a sequence of them, got NoneType"),
    ((torch.zeros(6, 4, 3, 16), None), "caches[1] must be a torch.Tensor, got NoneType"),
    ([np.zeros((6, 4, 3, 16)), torch.zeros(6, 4, 3, 16)], "caches[0] must be a torch.Tensor, got ndarray"),
])  # fmt: skip
def test_caches_that_are_no_tensors(caches, text):
    given = {n: as_torch(x) for n, x in valid(dtype="float32").items()}
    with pytest.raises(TypeError) as caught:
        torchkv.rope_and_cache(**given | {"caches": caches})
    assert str(caught.value) == text


def test_a_name_of_vllms_is_understood():
    given = {n: as_torch(x) for n, x in valid().items()}
    torchkv.rope_and_cache(**given, kv_cache_dtype="bfloat16")
    with pytest.raises(
        TypeError, match=r"^key_cache must have dtype float32 for kv_cache_dtype 'float', got bfloat16$"
    ):
        torchkv.rope_and_cache(**given, kv_cache_dtype="float")


def test_triton_on_a_cpu_is_an_error():
    with pytest.raises(ValueError, match=r"^backend 'triton' needs a CUDA or ROCm device, got cpu$"):
        run_torch(CASES[0].make(), backend="triton")
