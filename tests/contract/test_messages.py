"""What a user's first mistakes say, in both frameworks: one line that names the argument and the way out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxkv
import torchkv
from kvcore.layout import CacheLayout
from kvcore.pattern import CONSTANTS
from tests.cases.arrays import random_normal, to_torch

BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE = 6, 4, 3, 16


def draws(*shape):
    return random_normal(np.random.default_rng(sum(shape)), shape, "float32")


ROWS, SLOTS = draws(5, HEADS, HEAD_SIZE), np.arange(5, dtype=np.int32)
NHD, HND = (BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE), (BLOCKS, HEADS, BLOCK_SIZE, HEAD_SIZE)
TABLES, LENS = np.array([[1, 2], [3, 0]], np.int32), np.array([5, 3], np.int32)
BOTH = pytest.mark.parametrize(("module", "convert"), [(jaxkv, jnp.asarray), (torchkv, to_torch)])


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


# ---- layouts


@BOTH
def test_caches_in_the_other_order_are_named(module, convert):
    rows, slots, tables, lens = map(convert, (ROWS, SLOTS, TABLES, LENS))
    caches = convert(draws(*HND)), convert(draws(*HND) + 1)
    key = "key must have shape (num_tokens, 4, 16), got (5, 3, 16)"
    hint = "; for caches [num_blocks, num_heads, block_size, head_size] pass layout='HND'"
    with says(ValueError, key + hint):
        module.reshape_and_cache_flash(rows, rows, *caches, slots)
    module.reshape_and_cache_flash(rows, rows, *caches, slots, layout="HND")
    with says(ValueError, "query must have a multiple of 4 heads, as the cache has, got 6" + hint):
        module.paged_attention(convert(draws(2, 6, HEAD_SIZE)), caches, tables, lens)

    layers = [cache[None] for cache in caches]
    hint = "; for caches [num_layers, num_blocks, num_heads, block_size, head_size] pass "
    with says(ValueError, key + hint + "layout='layer block head slot dim'"):
        module.reshape_and_cache_flash(rows, rows, *layers, slots, layer=0)
    packed = convert(draws(BLOCKS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE))
    hint = "; for caches [num_blocks, num_heads, block_size, head_size + head_size_v] pass layout='PACKED_HND'"
    with says(ValueError, key + hint):
        module.reshape_and_cache_flash_diffkv(rows, rows, packed, slots)


@BOTH
def test_other_heads_get_no_hint_of_the_other_order(module, convert):
    rows, slots = convert(ROWS), convert(SLOTS)
    for shape, layout, wanted in (
        (HND, "NHD", "(num_tokens, 4, 16)"),  # the user says so
        ((BLOCKS, 7, BLOCK_SIZE, HEAD_SIZE), None, "(num_tokens, 4, 16)"),
        ((BLOCKS, HEADS, BLOCK_SIZE, 8), None, "(num_tokens, 4, 8)"),
    ):
        caches = convert(draws(*shape)), convert(draws(*shape) + 1)
        with says(ValueError, f"key must have shape {wanted}, got (5, 3, 16)"):
            module.reshape_and_cache_flash(rows, rows, *caches, slots, layout=layout)


@pytest.mark.parametrize("name", CONSTANTS)
def test_layout_names_in_any_case(name):
    for spelled in (name.lower(), name.title(), f" {name} "):
        assert CacheLayout.of(spelled) == getattr(CacheLayout, name)


@BOTH
def test_ops_take_layout_names_in_any_case(module, convert):
    rows, slots = convert(ROWS), convert(SLOTS)
    caches = convert(draws(*HND)), convert(draws(*HND) + 1)
    new = module.reshape_and_cache_flash(rows, rows, *caches, slots, layout="hnd")
    np.testing.assert_array_equal(np.asarray((new or caches)[0])[1, :, 0], ROWS[4])
    extents = dict(num_blocks=8, block_size=4, num_heads=2, head_size=16)
    assert module.PagedKVCache.create(**extents, layout="Hnd").spec.layout == CacheLayout.HND


@BOTH
def test_an_unknown_layout_name_lists_the_names(module, convert):
    text = (
        f"layout must be one of {', '.join(CONSTANTS)}, or a pattern of the axes layer, block, slot, head, kv, dim, "
        "dim/x, x, k+v, latent, got 'NDH'"
    )
    with says(ValueError, text):
        module.PagedKVCache.create(num_blocks=8, block_size=4, num_heads=2, head_size=16, layout="NDH")
    caches = convert(draws(*NHD)), convert(draws(*NHD) + 1)
    with says(ValueError, text):
        module.gather_kv(caches, convert(TABLES), convert(LENS), 5, layout="NDH")


# ---- PagedKVCache.create


def create(module, **options):
    return module.PagedKVCache.create(**dict(num_blocks=8, block_size=4, num_heads=2, head_size=16) | options)


@BOTH
@pytest.mark.parametrize(("dtype", "hint"), [
    ("fp8", ": what a quantised cache holds is kv_cache_dtype='fp8'"),
    ("nvfp4", ": what a quantised cache holds is kv_cache_dtype='nvfp4'"),
    ("float8_e5m2", ": what a quantised cache holds is kv_cache_dtype='fp8_e5m2'"),
    ("int8", ": what a quantised cache holds is kv_cache_dtype='int8'"),
    ("float64", ""),
    ("half a byte", ""),
])  # fmt: skip
def test_a_format_given_as_dtype(dtype, hint, module, convert):
    text = "dtype must be float32, bfloat16 or float16, the type of elements, got "
    with says(TypeError, f"{text}{dtype}{hint}"):
        create(module, dtype=dtype)


@BOTH
def test_num_kv_heads_is_another_name_of_num_heads(module, convert):
    options = dict(kv_cache_dtype="fp8", k_scale=convert(np.ones(3, np.float32)))
    cache = create(module, num_heads=None, num_kv_heads=3, **options)
    assert cache.spec == create(module, num_heads=3, **options).spec
    with says(TypeError, "num_heads must be given once, also as num_kv_heads, got both: 2 and 2"):
        create(module, num_kv_heads=2)
    with says(TypeError, "num_heads must be given, got None"):
        create(module, num_heads=None)


EXTENTS = ["num_layers", "num_blocks", "block_size", "num_heads", "head_size", "head_size_v"]


@BOTH
@pytest.mark.parametrize("name", EXTENTS)
def test_extents_that_are_no_integers(name, module, convert):
    for wrong in (8.0, "8", True, np.float32(8)):
        with says(TypeError, f"{name} must be an int, got {wrong!r}"):
            create(module, **{name: wrong})
        with says(TypeError, f"{name} must be an int, got {wrong!r}"):
            CacheLayout.NHD.shapes(**dict(num_blocks=8, block_size=4, num_heads=2, head_size=16) | {name: wrong})
    assert getattr(create(module, **{name: np.int64(8)}), name) == 8


@BOTH
def test_a_cache_tells_its_extents(module, convert):
    given = dict(zip(EXTENTS, (2, 8, 4, 3, 16, 24), strict=True))
    cache = create(module, layout="PACKED_NHD", **given)
    assert {name: getattr(cache, name) for name in EXTENTS} == given
    assert create(module).num_layers is None


# ---- sizes of results


@BOTH
@pytest.mark.parametrize("wrong", [5.0, "5", None])
def test_sizes_of_results_that_are_no_integers(wrong, module, convert):
    caches, tables, lens = (convert(draws(*NHD)), convert(draws(*NHD) + 1)), convert(TABLES), convert(LENS)
    with says(TypeError, f"max_len must be an int, got {wrong!r}"):
        module.gather_kv(caches, tables, lens, wrong)


def test_a_traced_max_len_is_one_sentence():
    caches, tables, lens = (jnp.asarray(draws(*NHD)), jnp.asarray(draws(*NHD))), jnp.asarray(TABLES), jnp.asarray(LENS)
    gather = jax.jit(lambda **sizes: jaxkv.gather_kv(caches, tables, lens, **{"max_len": 5} | sizes))
    for name in ("max_len", "head_size", "head_size_v"):
        text = f"{name} must be a static int, got a traced value: give '{name}' to jax.jit's static_argnames"
        with pytest.raises(TypeError, match=f"^{text}"):  # JAX adds a note
            gather(**{name: 5})
    key, _ = jaxkv.gather_kv(caches, tables, lens, jnp.int32(5))
    assert key.shape == (2, 5, HEADS, HEAD_SIZE)


@BOTH
def test_a_result_of_an_unknown_dtype(module, convert):
    caches, tables, lens = (convert(draws(*NHD)), convert(draws(*NHD) + 1)), convert(TABLES), convert(LENS)
    with says(TypeError, "dtype must be float32, bfloat16 or float16, got fp8"):
        module.gather_kv(caches, tables, lens, 5, dtype="fp8")


# ---- torch: what is no tensor


def calls():
    """Functions of torchkv with valid arguments by name, and the names of those that must be tensors."""
    rows, slots, tables, lens = map(to_torch, (ROWS, SLOTS, TABLES, LENS))
    write = {"key": rows, "value": rows, "key_cache": to_torch(draws(*NHD)), "value_cache": to_torch(draws(*NHD))}
    diffkv = {"key": rows, "value": rows, "kv_cache": to_torch(draws(*NHD[:3], 2 * HEAD_SIZE))}
    scales = {name: to_torch(draws(*NHD[:3])) for name in ("k_scale_cache", "v_scale_cache")}
    mla = {"kv_c": rows[:, 0], "k_pe": rows[:, 1, :8], "kv_cache": to_torch(draws(BLOCKS, BLOCK_SIZE, 24))}
    read = {"caches": tuple(write.values())[2:], "block_tables": tables, "seq_lens": lens}
    starts, sinks, out = torch.tensor([0, 1, 2]), torch.ones(6), torch.ones(2, 3, 6)
    return {
        "reshape_and_cache_flash": write | {"slot_mapping": slots},
        "reshape_and_cache_flash_diffkv": diffkv | {"slot_mapping": slots},
        "reshape_and_cache_flash_per_token_head_quant": write | scales | {"slot_mapping": slots},
        "reshape_and_cache_flash_diffkv_per_token_head_quant": diffkv | scales | {"slot_mapping": slots},
        "concat_and_cache_mla": mla | {"slot_mapping": slots},
        "paged_attention": {"query": to_torch(draws(2, 6, HEAD_SIZE))} | read | {
            "query_start_loc": starts, "sinks": sinks
        },
        "gather_kv": read,
        "merge_attention": {"outs": out[..., None], "lses": out},
        "kv_scales": {"key": rows, "value": rows},
    }  # fmt: skip


@pytest.mark.parametrize("function", calls())
def test_lists_and_numpy_arrays_given_to_torch_are_one_line(function):
    given = calls()[function]
    options = {"max_len": 5} if function == "gather_kv" else {}
    if "quant" in function or function == "kv_scales":
        options["kv_cache_dtype"] = "int8"
    if "quant" not in function and "cache_flash" in function:
        options |= {"k_scale": 2.0}  # made into a tensor, on the device of the caches
    for name, right in given.items():
        if name == "caches":
            continue
        optional = "None or " if name in ("query_start_loc", "sinks") else ""
        for wrong in (right.numpy(), right.tolist()):
            text = f"{name} must be {optional}a torch.Tensor, got {type(wrong).__name__}"
            with says(TypeError, text):
                getattr(torchkv, function)(**given | {name: wrong} | options)
        if not optional:
            with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got None(Type)?$"):
                getattr(torchkv, function)(**given | {name: None} | options)


@pytest.mark.parametrize("function", ["paged_attention", "gather_kv"])
def test_caches_that_are_no_tensors(function):
    given = calls()[function] | ({"max_len": 5} if function == "gather_kv" else {})
    key_cache, value_cache = given["caches"]
    for caches, error, text in (
        (key_cache.numpy(), TypeError, "caches must be a torch.Tensor or a sequence of them, got ndarray"),
        (None, TypeError, "caches must be a torch.Tensor or a sequence of them, got NoneType"),
        ((key_cache, value_cache.numpy()), TypeError, "caches[1] must be a torch.Tensor, got ndarray"),
        ([key_cache.numpy(), value_cache], TypeError, "caches[0] must be a torch.Tensor, got ndarray"),
        ((), ValueError, "caches must be (key_cache, value_cache) or one array, got 0 arrays"),
    ):
        with says(error, text):
            getattr(torchkv, function)(**given | {"caches": caches, "k_scale": 2.0, "kv_cache_dtype": "auto"})


def test_a_cache_given_lists_is_one_line():
    cache = create(torchkv, num_heads=HEADS)
    rows, slots, tables, lens = map(to_torch, (ROWS, SLOTS, TABLES, LENS))
    with says(TypeError, "value must be a torch.Tensor, got list"):
        cache.write(rows, rows.tolist(), slots)
    with says(TypeError, "slot_mapping must be a torch.Tensor, got list"):
        cache.write(rows.bfloat16(), rows.bfloat16(), slots.tolist())
    with says(TypeError, "query must be a torch.Tensor, got list"):
        cache.attend(rows[:2].tolist(), tables, lens)
    with says(TypeError, "block_tables must be a torch.Tensor, got ndarray"):
        cache.gather(TABLES, lens, 5)
    with says(TypeError, "layer must be None or an int, got ndarray"):
        cache.gather(tables, lens, 5, layer=np.array([0, 1]))


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_errors_that_no_argument_explains_stay(error, monkeypatch):
    def fail(*_):
        raise error("of another kind")

    monkeypatch.setattr("torchkv._library.write._BACKENDS.torch", fail)
    monkeypatch.setattr("torchkv._library.read._GATHER_BACKENDS.torch", fail)
    for function in ("reshape_and_cache_flash", "concat_and_cache_mla", "gather_kv"):
        options = {"max_len": 5} if function == "gather_kv" else {}
        with says(error, "of another kind"):
            getattr(torchkv, function)(**calls()[function] | options)


# ---- torch: a cache moved, saved and loaded

KINDS = {
    "two arrays": dict(num_layers=2),
    "one array": dict(layout="PACKED_HND", head_size_v=8),
    "latent": dict(layout="MLA", num_heads=1, head_size_v=12),
    "static scales": dict(kv_cache_dtype="fp8", k_scale=0.5, v_scale=[2.0, 3.0]),
    "computed scales": dict(kv_cache_dtype="int8", per_token_head=True),
}


def filled(**options):
    """A cache whose every tensor holds something of its own."""
    cache = create(torchkv, **options)
    for i, tensor in enumerate(t for t in (*cache.caches, cache.k_scale, cache.v_scale) if t is not None):
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) % 100 + i + 1)
    return cache


def contents(cache):
    return [t if t is None else t.clone() for t in (*cache.caches, cache.k_scale, cache.v_scale)]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_cache_is_saved_and_loaded(options, tmp_path):
    cache, other = filled(**options), create(torchkv, **options)
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    places = [t.data_ptr() for t in other.caches]
    assert other.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True)) is None
    assert [t.data_ptr() for t in other.caches] == places
    for got, want in zip(contents(other), contents(cache), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


@pytest.mark.parametrize(("options", "change", "error", "text"), [
    ({}, dict(num_blocks=9), ValueError, "state's num_blocks must be 8, as in this cache, got 9"),
    (
        {}, dict(layout="HND"), ValueError,
        "state's layout must be 'block slot head dim', as in this cache, got 'block head slot dim'",
    ),
    ({}, dict(dtype="float32"), ValueError, "state's dtype must be 'bfloat16', as in this cache, got 'float32'"),
    (
        KINDS["static scales"], dict(k_scale=None), ValueError,
        "state's k_scale must be a torch.Tensor, as in this cache, got None",
    ),
    (KINDS["static scales"], dict(v_scale=1.0), ValueError, "state's v_scale must have shape (2,), got ()"),
    (
        {}, dict(layout="PACKED_NHD"), ValueError,
        "state must have the entries key_cache, value_cache, k_scale, v_scale, spec, got kv_cache, k_scale, v_scale, "
        "spec",
    ),
])  # fmt: skip
def test_a_state_of_another_cache_is_refused_before_anything_is_copied(options, change, error, text):
    cache = filled(**options)
    before = contents(cache)
    with says(error, text):
        cache.load_state_dict(create(torchkv, **options | change).state_dict())
    for got, want in zip(contents(cache), before, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def test_a_state_that_was_changed_is_refused():
    cache = filled()
    _, values = cache.caches
    for value_cache, error, text in (
        ([1.0], TypeError, "be a torch.Tensor, got list"),
        (values[1:], ValueError, "have shape (8, 4, 2, 16), got (7, 4, 2, 16)"),
        (values.float(), TypeError, "have dtype bfloat16, got float32"),
    ):
        with says(error, f"state's value_cache must {text}"):
            cache.load_state_dict(filled().state_dict() | {"value_cache": value_cache})
    with says(TypeError, "state's spec must be a dict, got NoneType"):
        cache.load_state_dict(filled().state_dict() | {"spec": None})


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_cache_is_moved(options):
    cache = filled(**options)
    assert cache.to("cpu") is cache
    moved = cache.to("meta")  # a device that every build has
    assert moved.spec == cache.spec
    for there, here in zip((*moved.caches, moved.k_scale, moved.v_scale), contents(cache), strict=True):
        assert there is here is None or (there.device.type, there.shape) == ("meta", here.shape)
    assert all(t.device.type == "cpu" for t in cache.caches)
