"""What jaxkv takes for an array: lists, NumPy's arrays, integers of any width; and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from tests.cases.arrays import bits, make_case, random_normal, run_jax, run_oracle

RNG = np.random.default_rng(0)
LAYERS, BLOCKS, SIZE, HEADS, DIM = 2, 4, 4, 2, 16


def draw(*shape):
    return random_normal(np.random.default_rng(sum(shape)), shape, "float32")


KEY, VALUE, QUERY = draw(3, HEADS, DIM), draw(3, HEADS, DIM) + 1, draw(2, 4, DIM)
CACHE, BYTES = draw(LAYERS, BLOCKS, SIZE, HEADS, DIM), np.full((LAYERS, BLOCKS, SIZE, HEADS, DIM), 7, np.uint8)
SLOTS, TABLES, LENS, STARTS = (np.array(x, np.int32) for x in ([1, -1, 14], [[0, 3], [2, 1]], [5, 2], [0, 1, 2]))
SCALES = np.array([0.5, 2.0], np.float32)
LAYOUT = "layer block slot head dim"
WRITE = {"key": KEY, "value": VALUE, "slot_mapping": SLOTS, "layer": np.array([1], np.int32)}
READ = {"block_tables": TABLES, "seq_lens": LENS, "layer": np.array([1], np.int32)}
SCALED = {"kv_cache_dtype": "fp8", "k_scale": SCALES, "v_scale": SCALES[::-1].copy()}
OPS = {
    "flash": (jaxkv.reshape_and_cache_flash, WRITE | SCALED | {"key_cache": BYTES, "value_cache": BYTES + 1}),
    "diffkv": (
        jaxkv.reshape_and_cache_flash_diffkv, WRITE | {"kv_cache": draw(LAYERS, BLOCKS, SIZE, HEADS, 2 * DIM)},
    ),
    "token and head": (
        jaxkv.reshape_and_cache_flash_per_token_head_quant,
        WRITE | {"key_cache": BYTES, "value_cache": BYTES + 1, "kv_cache_dtype": "int8",
                 "k_scale_cache": CACHE[..., 0].copy(), "v_scale_cache": CACHE[..., 1].copy()},
    ),
    "diffkv, token and head": (
        jaxkv.reshape_and_cache_flash_diffkv_per_token_head_quant,
        WRITE | {"kv_cache": np.full((LAYERS, BLOCKS, SIZE, HEADS, 2 * DIM), 9, np.uint8), "kv_cache_dtype": "fp8",
                 "k_scale_cache": CACHE[..., 0].copy(), "v_scale_cache": CACHE[..., 1].copy()},
    ),
    "mla": (
        jaxkv.concat_and_cache_mla,
        {"kv_c": draw(3, 12), "k_pe": draw(3, 4), "kv_cache": BYTES[:, :, :, 0].copy(), "slot_mapping": SLOTS,
         "kv_cache_dtype": "fp8", "scale": SCALES[:1], "layer": np.array(1)},
    ),
    "attention": (
        jaxkv.paged_attention,
        READ | {"query": QUERY, "caches": (CACHE, CACHE + 1), "query_start_loc": STARTS, "sinks": draw(4),
                "layout": LAYOUT},
    ),
    "gather": (jaxkv.gather_kv, READ | SCALED | {"caches": (BYTES, BYTES + 1), "max_len": 6}),
    "merge": (jaxkv.merge_attention, {"outs": draw(2, 3, 4, DIM), "lses": draw(2, 3, 4)}),
    "kv_scales": (jaxkv.kv_scales, {"key": KEY, "value": VALUE, "kv_cache_dtype": "int8"}),
}  # fmt: skip
INTEGERS = ("slot_mapping", "block_tables", "seq_lens", "query_start_loc", "layer")


def call(name, **changes):
    op, arguments = OPS[name]
    got = op(**(arguments | changes))
    return [np.asarray(x) for x in (got if isinstance(got, tuple) else (got,))]


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(bits(g), bits(w))


def on_device(x):
    return tuple(map(jnp.asarray, x)) if isinstance(x, tuple) else jnp.asarray(x) if isinstance(x, np.ndarray) else x


def arguments_of(kinds):
    """Each op with each argument that is an array of these kinds."""
    return [
        pytest.param(name, argument, id=f"{name}: {argument}")
        for name, (_, arguments) in OPS.items()
        for argument, x in arguments.items()
        if isinstance(x, np.ndarray) and x.dtype.kind in kinds
    ]


@pytest.mark.parametrize("name", OPS)
def test_arrays_of_numpy_and_of_jax_give_the_same(name):
    want = call(name, **{n: on_device(x) for n, x in OPS[name][1].items()})
    assert_same(call(name), want)
    changed = OPS[name][1].get("slot_mapping")
    if changed is not None:  # the call does something
        before = next(x for x in OPS[name][1].values() if isinstance(x, np.ndarray) and x.ndim > 3)
        assert any((w != before).any() for w in want if w.shape == before.shape)


@pytest.mark.parametrize(("name", "argument"), [a for a in arguments_of("fi") if "cache" not in a.values[1]])
def test_lists_are_taken_for_every_argument(name, argument):
    x = OPS[name][1][argument]
    assert_same(call(name, **{argument: x.tolist()}), call(name))
    if x.ndim:
        assert_same(call(name, **{argument: list(x)}), call(name))
        assert_same(call(name, **{argument: [jnp.asarray(row) for row in x]}), call(name))


def test_an_empty_list_of_slots_writes_nothing():
    arguments = OPS["diffkv"][1]
    assert_same(call("diffkv", slot_mapping=[]), [arguments["kv_cache"]])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("name", ["flash", "attention", "gather"])
@pytest.mark.x64
def test_integers_of_any_width(name, dtype, traced, x64):
    if traced and dtype in ("int64", "uint64") and not x64:
        pytest.skip("JAX has no such array")
    op, arguments = OPS[name]
    given = {n: x.astype(dtype) for n, x in arguments.items() if n in INTEGERS}
    want = call(name)
    if dtype.startswith("u") and name == "flash":  # -1 as they have it is beyond all slots
        assert given["slot_mapping"][1] > 100
    got = (
        jax.jit(lambda x: op(**(arguments | x)))({n: jnp.asarray(x) for n, x in given.items()})
        if traced else op(**(arguments | given))
    )  # fmt: skip
    assert_same([np.asarray(x) for x in (got if isinstance(got, tuple) else (got,))], want)


@pytest.mark.parametrize("dtype", ["uint32", "int64", "uint64"])
@pytest.mark.x64
def test_integers_that_int32_cannot_hold_stay_outside(dtype, x64):
    big = np.array([2**32 + 1 if dtype != "uint32" else 2**31 + 1, 2**31, 14], np.uint64).astype(dtype)
    for convert in (np.asarray, jnp.asarray) if x64 or dtype == "uint32" else (np.asarray,):
        assert_same(call("flash", slot_mapping=convert(big)), call("flash", slot_mapping=[-1, -1, 14]))
        tables = convert(np.array([[big[0], 3], [2, big[1]]], dtype))
        assert_same(call("gather", block_tables=tables), call("gather", block_tables=[[-1, 3], [2, -1]]))
        assert_same(call("gather", seq_lens=convert(big[:2])), call("gather", seq_lens=[8, 8]))
        assert_same(call("attention", seq_lens=convert(big[:2]), causal=False, query_start_loc=None),
                    call("attention", seq_lens=[8, 8], causal=False, query_start_loc=None))  # fmt: skip


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("name", "argument"), arguments_of("fiu"))
def test_truth_values_are_refused_for_every_array(name, argument, traced):
    op, arguments = OPS[name]
    truth = np.ones(arguments[argument].shape, bool)
    ways = {"traced": lambda: jax.jit(lambda x: op(**(arguments | {argument: x})))(truth)} if traced else {
        "NumPy": lambda: call(name, **{argument: truth}),
        "JAX": lambda: call(name, **{argument: jnp.asarray(truth)}),
        "list": lambda: call(name, **{argument: truth.tolist()}),
    }  # fmt: skip
    for way in ways.values():
        with pytest.raises(TypeError, match=r"^\w+ must (have dtype|be an int|be a number).*(bool|True)"):
            way()


@pytest.mark.parametrize(("name", "argument"), [a for a in arguments_of("i") if a.values[1] in INTEGERS])
def test_floats_are_no_indices(name, argument):
    x = OPS[name][1][argument].astype(np.float64)
    for given, dtype in ((x.tolist(), "float64"), (x, "float64"), (jnp.asarray(x, jnp.float32), "float32")):
        if np.ndim(given) == 0 and isinstance(given, float):
            error = r"^layer must be an int or an integer scalar, got 1\.0$"
        else:
            error = rf"^{argument} must have dtype int32 or int64, got {dtype}$"
        with pytest.raises(TypeError, match=error):
            call(name, **{argument: given})


@pytest.mark.parametrize(("name", "argument", "lists", "error"), [
    ("gather", "block_tables", [[0, 3], [2]], r"block_tables must have shape \(num_seqs, max_blocks\), got \(2,\)"),
    ("flash", "key", [[[1.0] * DIM] * HEADS, [[1.0] * DIM, [1.0]]], r"key must have shape \(.*\), got \(2, 2\)"),
    ("flash", "k_scale", [0.5, [2.0]], "k_scale must have dtype float32, got object"),
])  # fmt: skip
def test_lists_of_different_lengths_are_refused_by_name(name, argument, lists, error):
    with pytest.raises((ValueError, TypeError), match=rf"^{error}$"):
        call(name, **{argument: lists})


@pytest.mark.parametrize("method", ["relayout", "swap_blocks"])
def test_pairs_of_different_lengths_are_refused_by_name(method):
    cache, other = (jaxkv.PagedKVCache.create(num_blocks=2, block_size=2, num_heads=1, head_size=4) for _ in range(2))
    with pytest.raises(ValueError, match=r"^pairs must have shape \(n, 2\), got \(2,\)$"):
        getattr(cache, method)(other, [[0, 1], [1]])


@pytest.mark.parametrize(("name", "argument"), arguments_of("f"))
def test_what_jax_would_round_is_refused(name, argument):
    """Arrays of float64 are not silently made float32."""
    with pytest.raises(TypeError, match=r"^\w+ must have dtype .*float64"):
        call(name, **{argument: OPS[name][1][argument].astype(np.float64)})


@pytest.mark.parametrize("number", [2, 2.0, np.float16(2), np.float32(2), np.float64(2), np.int8(2), np.uint64(2),
                                    [2, 2], [2.0, 2.0], np.full(2, 2, np.float32)], ids=repr)  # fmt: skip
def test_scales_are_numbers_lists_or_arrays(number):
    for name in ("flash", "gather"):
        assert_same(call(name, k_scale=number), call(name, k_scale=jnp.float32(2)))
    if np.ndim(number) == 0:
        assert_same(call("mla", scale=number), call("mla", scale=jnp.float32(2)))
    cache = jaxkv.PagedKVCache.create(
        num_blocks=2, block_size=2, num_heads=2, head_size=16, kv_cache_dtype="fp8", k_scale=number
    )
    assert cache.k_scale.dtype == jnp.float32
    np.testing.assert_array_equal(cache.k_scale, np.full(np.shape(number), 2))


@pytest.mark.parametrize(("scale", "kind", "error"), [
    (True, TypeError, "k_scale must be a number or an array of float32, got True"),
    ("1", TypeError, "k_scale must be a number or an array of float32, got '1'"),
    (np.ones(2), TypeError, "k_scale must have dtype float32, got float64"),
    ([1.0, 2.0, 3.0], ValueError, r"k_scale must have shape \(\), \(1,\) or \(2,\), got \(3,\)"),
])  # fmt: skip
def test_a_cache_is_not_created_with_scales_that_its_ops_refuse(scale, kind, error):
    with pytest.raises(kind, match=f"^{error}$"):
        jaxkv.PagedKVCache.create(
            num_blocks=2, block_size=2, num_heads=2, head_size=16, kv_cache_dtype="fp8", k_scale=scale
        )


@pytest.mark.parametrize(
    "layer", [1, np.int8(1), np.uint64(1), np.array(1), np.array([1], np.uint8), [1], jnp.array(1)], ids=repr
)
def test_layers_are_numbers_lists_or_arrays(layer):
    for name in ("flash", "attention", "gather", "mla"):
        assert_same(call(name, layer=layer), call(name))


def test_a_cache_takes_lists():
    cache = jaxkv.PagedKVCache.create(num_blocks=4, block_size=4, num_heads=HEADS, head_size=DIM, dtype="float32")
    lists = cache.write(KEY.tolist(), VALUE.tolist(), SLOTS.tolist())
    arrays = cache.write(*map(jnp.asarray, (KEY, VALUE, SLOTS)))
    assert_same(map(np.asarray, lists.caches), map(np.asarray, arrays.caches))
    assert_same(
        [np.asarray(lists.attend(QUERY.tolist(), TABLES.tolist(), LENS.tolist()))],
        [np.asarray(arrays.attend(*map(jnp.asarray, (QUERY, TABLES, LENS))))],
    )
    key, value = lists.gather(TABLES.tolist(), LENS.tolist(), np.int64(5))
    np.testing.assert_array_equal(key[0, 1], KEY[0])
    np.testing.assert_array_equal(value[0, 1], VALUE[0])


# ---- arrays of NumPy that change after the call, as a server's tables do; JAX reads them where they are, and later


@jax.jit
def unhurried(x, times):
    """The array, computed for so long that a call which needs it returns before; XLA runs what is small at once."""
    square = jnp.full((1500, 1500), 1 / 1500, x.dtype)
    return x + 0 * jax.lax.fori_loop(0, times, lambda _, y: y @ square, square)[0, 0]


def shareable(x):
    """An array of NumPy like this one at an address that JAX takes as it is."""
    memory = np.zeros(x.nbytes + 64, np.uint8)
    at = -memory.ctypes.data % 64
    new = memory[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
    new[...] = x
    return new


@pytest.mark.parametrize("name", OPS)
def test_what_numpy_holds_may_change_after_the_call(name):
    op, arguments = OPS[name]
    awaited = next(n for n in ("query", "key", "kv_c", "outs", "k_scale") if n in arguments)
    on_time = jnp.asarray(arguments[awaited])
    want = call(name, **{awaited: on_time})
    for times in (5, 100, 600):  # a busy machine may take longer for the call
        given = jax.tree.map(lambda x: shareable(x) if isinstance(x, np.ndarray) else x, arguments)
        late = unhurried(on_time, times)
        got = op(**(given | {awaited: late}))
        for x in jax.tree.leaves(given):
            if isinstance(x, np.ndarray):
                x[...] = 1
        returned_before = not late.is_ready()
        assert_same([np.asarray(x) for x in (got if isinstance(got, tuple) else (got,))], want)
        if returned_before:
            return
    pytest.fail("no call returned before its operands were there")


def test_what_a_memoryview_shows_may_change_after_the_call():
    tables = np.tile(TABLES[:1], (32, 1))
    want = jaxkv.gather_kv((CACHE[0], CACHE[1]), tables, np.full(32, 5), 8)
    for times in (15, 100, 600):
        lens = shareable(np.full(32, 5, np.int32))
        late = unhurried(jnp.asarray(CACHE[0]), times)
        got = jaxkv.gather_kv((late, CACHE[1]), tables, memoryview(lens), 8)
        lens[...] = 1
        returned_before = not late.is_ready()
        assert_same(map(np.asarray, got), map(np.asarray, want))
        if returned_before:
            return
    pytest.fail("no call returned before its operands were there")


# ---- one array given twice


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("jit", [False, True])
def test_one_array_as_both_caches_gives_two_results(jit, backend):
    case = make_case(np.random.default_rng(1), num_heads=1)
    case.caches[1] = case.caches[0]

    def write(cache, slots):
        return jaxkv.reshape_and_cache_flash(case.key, case.value, cache, cache, slots, backend=backend)

    cache, slots = jnp.asarray(case.caches[0]), jnp.asarray(case.slot_mapping, jnp.int32)
    key_cache, value_cache = (jax.jit(write) if jit else write)(cache, slots)
    assert_same([np.asarray(key_cache), np.asarray(value_cache)], run_oracle(case))
    assert_same([np.asarray(cache)], [case.caches[0]])
    assert key_cache.unsafe_buffer_pointer() != value_cache.unsafe_buffer_pointer()


@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_one_array_as_both_caches_and_one_as_both_scale_caches(backend):
    case = make_case(np.random.default_rng(2), kv_cache_dtype="int8", per_token_head=True)
    case.caches[1], case.scale_caches[1] = case.caches[0], case.scale_caches[0]
    cache, scales = jnp.asarray(case.caches[0]), jnp.asarray(case.scale_caches[0])
    slots = jnp.asarray(case.slot_mapping, jnp.int32)
    new = jaxkv.reshape_and_cache_flash_per_token_head_quant(
        case.key, case.value, cache, cache, scales, scales, slots, "int8", backend=backend
    )
    assert_same(map(np.asarray, new), run_oracle(case))


def test_one_array_of_zeros_as_both_caches_in_a_loop():
    case = make_case(np.random.default_rng(3), dtype="float32", bits=False)
    zeros = jnp.zeros(case.caches[0].shape)
    case.caches = [np.zeros_like(c) for c in case.caches]

    @jax.jit
    def run(key, value, cache, slots):
        def step(i, caches):
            return jaxkv.reshape_and_cache_flash(key, value, *caches, slots)

        return jax.lax.fori_loop(0, 2, step, (cache, cache))

    got = run(case.key, case.value, zeros, jnp.asarray(case.slot_mapping, jnp.int32))
    assert_same(map(np.asarray, got), run_oracle(case))


@pytest.mark.parametrize("jit", [False, True])
def test_one_ref_twice_is_an_error(jit):
    case = make_case(np.random.default_rng(4), kv_cache_dtype="int8", per_token_head=True)
    caches, scales = [jax.new_ref(jnp.asarray(c)) for c in case.caches], jax.new_ref(jnp.asarray(case.scale_caches[0]))

    def write(key_cache, value_cache, scale_cache):
        jaxkv.reshape_and_cache_flash_per_token_head_quant(
            case.key, case.value, key_cache, value_cache, scale_cache, scale_cache,
            jnp.asarray(case.slot_mapping, jnp.int32), "int8",
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"^k_scale_cache and v_scale_cache must not overlap in memory"):
        (jax.jit(write) if jit else write)(*caches, scales)


def test_runs_in_jax_with_random_bits():
    """The case that the arguments above are variants of, with every bit pattern."""
    case = make_case(np.random.default_rng(5))
    assert_same(run_jax(case), run_oracle(case))
