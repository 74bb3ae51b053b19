"""Eager calls: what the first of a kind has compiled serves all others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from tests.cases.arrays import random_normal
from tests.cases.jax_compiling import COMPILING

HEADS, DIM = 2, 16


def draw(*shape, integers=False):
    if integers:
        return jnp.asarray(np.random.default_rng(sum(shape)).integers(0, 255, shape, np.uint8))
    return jnp.asarray(random_normal(np.random.default_rng(sum(shape)), shape, "float32"))


ROWS = {"key": draw(3, HEADS, DIM), "value": draw(3, HEADS, DIM), "slot_mapping": jnp.array([1, -1, 14])}
CACHE = (4, 4, HEADS, DIM)
TABLES = {"block_tables": jnp.array([[0, 3], [2, 1]]), "seq_lens": jnp.array([5, 2])}
FP8 = {"kv_cache_dtype": "fp8", "k_scale": 0.5, "v_scale": draw(HEADS)}
OWN = {"k_scale_cache": draw(*CACHE[:3]), "v_scale_cache": draw(*CACHE[:3]), "kv_cache_dtype": "int8"}
PAIR = {"key_cache": draw(*CACHE, integers=True), "value_cache": draw(*CACHE, integers=True)}
OPS = {
    "flash": (jaxkv.reshape_and_cache_flash, ROWS | FP8 | PAIR),
    "nvfp4": (
        jaxkv.reshape_and_cache_flash,
        ROWS | {n: c[..., :9] for n, c in PAIR.items()} | {"kv_cache_dtype": "nvfp4"},
    ),
    "diffkv": (jaxkv.reshape_and_cache_flash_diffkv, ROWS | {"kv_cache": draw(4, 4, HEADS, 2 * DIM)}),
    "token and head": (jaxkv.reshape_and_cache_flash_per_token_head_quant, ROWS | PAIR | OWN),
    "diffkv, token and head": (
        jaxkv.reshape_and_cache_flash_diffkv_per_token_head_quant,
        ROWS | OWN | {"kv_cache": draw(4, 4, HEADS, 2 * DIM, integers=True)},
    ),
    "mla": (
        jaxkv.concat_and_cache_mla,
        {"kv_c": draw(3, 12), "k_pe": draw(3, 4), "kv_cache": draw(4, 4, DIM), "slot_mapping": ROWS["slot_mapping"]},
    ),
    "rope": (
        jaxkv.rope_and_cache,
        ROWS | PAIR | FP8 | {
            "query": draw(3, 4, DIM), "positions": jnp.array([0, 8, -1]), "cos_sin": draw(9, DIM), "q_norm": draw(DIM),
            "rope": "neox",
        },
    ),
    "attention": (
        jaxkv.paged_attention,
        TABLES | {"query": draw(2, 4, DIM), "key_cache": draw(*CACHE), "value_cache": draw(*CACHE)},
    ),
    "gather": (
        jaxkv.gather_kv, TABLES | FP8 | PAIR | {"max_len": 6},
    ),
    "merge": (jaxkv.merge_attention, {"outs": draw(2, 3, 4, DIM), "lses": draw(2, 3, 4)}),
    "kv_scales": (jaxkv.kv_scales, {"key": ROWS["key"], "value": ROWS["value"], "kv_cache_dtype": "int8"}),
}  # fmt: skip
WRITES = [name for name in OPS if "cache" in OPS[name][0].__name__]
CACHES = ("key_cache", "value_cache", "kv_cache", "k_scale_cache", "v_scale_cache")


def call(name, arrays, **more):
    op, arguments = OPS[name]
    arguments = arguments | arrays | more
    if name in ("attention", "gather", "rope"):
        arguments["caches"] = (arguments.pop("key_cache"), arguments.pop("value_cache"))
    return op(**arguments)


def arrays_of(name):
    return {n: x for n, x in OPS[name][1].items() if isinstance(x, jax.Array)}


def assert_compiled_once(function, *arguments):
    jax.block_until_ready(function(*arguments))
    COMPILING.clear()
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    assert not COMPILING


def test_the_counter_counts():
    jax.jit(lambda x: x * 2)(jnp.ones(3))
    COMPILING.clear()
    jax.jit(lambda x: x * 3)(jnp.ones(3))
    assert COMPILING


@pytest.mark.parametrize("name", OPS)
def test_arrays(name):
    assert_compiled_once(call, name, arrays_of(name))


@pytest.mark.parametrize("name", OPS)
def test_arrays_of_numpy_and_lists(name):
    arrays = {n: np.asarray(x) if n in CACHES else np.asarray(x).tolist() for n, x in arrays_of(name).items()}
    assert_compiled_once(call, name, arrays)


@pytest.mark.parametrize("name", WRITES)
def test_refs(name):
    refs = {n: jax.new_ref(x) for n, x in arrays_of(name).items() if n in CACHES}
    assert_compiled_once(call, name, refs)


@pytest.mark.parametrize("name", ["attention", "gather"])
def test_refs_that_are_read(name):
    refs = {n: jax.new_ref(x) for n, x in arrays_of(name).items() if n in CACHES}
    assert_compiled_once(call, name, refs)


@pytest.mark.parametrize("name", [*WRITES, "attention", "gather"])
@pytest.mark.parametrize("layout", ["layer block slot head {}", "block layer slot head {}"])
def test_layers_in_memory(layout, name):
    arrays, more = arrays_of(name), {"layer": jnp.array(1)}
    axis = 0 if layout.startswith("layer") or name == "mla" else 1
    stacked = {n: jnp.stack([x, x], 0 if n.endswith("scale_cache") else axis) for n, x in arrays.items() if n in CACHES}
    if name != "mla":
        more["layout"] = layout.format("k+v" if "diffkv" in name else "dim")
    assert_compiled_once(functools.partial(call, name, arrays | stacked, **more))


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("name", ["flash", "attention"])
def test_backends(name, backend):
    assert_compiled_once(functools.partial(call, name, arrays_of(name), backend=backend))


INDICES = ("slot_mapping", "block_tables", "seq_lens", "positions")


@pytest.mark.parametrize(
    ("name", "mapped"),
    [(name, None) for name in OPS] + [(n, m) for n in [*WRITES, "attention", "gather"] for m in (CACHES, INDICES)],
)
def test_vmap(name, mapped):
    arrays = arrays_of(name)
    axes = {n: 0 if mapped is None or n in mapped else None for n in arrays}
    batch = {n: x if axes[n] is None else jnp.stack([x, x, x]) for n, x in arrays.items()}
    assert_compiled_once(lambda: jax.vmap(functools.partial(call, name), in_axes=(axes,))(batch))


@pytest.mark.parametrize("layout", ["KV_NHD", "HND", "layer block slot head dim", "block layer slot head dim"])
def test_vmap_of_layouts(layout):
    """Whose batch is an axis of blocks, an axis of layers, or a loop."""
    from kvcore.layout import CacheLayout

    layers = 2 if "layer" in layout else None
    shapes = CacheLayout.of(layout).shapes(
        num_blocks=4, block_size=4, num_heads=HEADS, head_size=DIM, num_layers=layers
    )
    caches = [draw(3, *shape) for shape in shapes]
    key, value, slots = (jnp.stack([x] * 3) for x in ROWS.values())
    op = jaxkv.reshape_and_cache_flash if len(caches) == 2 else jaxkv.reshape_and_cache_flash_diffkv
    layer = None if layers is None else jnp.array([0, 1, 1])

    def write(key, value, slots, layer, *caches):
        return op(key, value, *caches, slots, layout=layout, layer=layer)

    def twice(*args):
        return jax.vmap(lambda *x: write(*x[:2], slots[0], *x[2:]))(*args)

    axes = (0, 0, 0, None if layer is None else 0, *(0 for _ in caches))
    assert_compiled_once(lambda: jax.vmap(write, in_axes=axes)(key, value, slots, layer, *caches))
    if layer is not None:
        assert_compiled_once(lambda: twice(key, value, layer, *caches))


def test_vmap_of_vmap():
    query, tables, lens = draw(2, 3, 2, 4, DIM), TABLES["block_tables"], TABLES["seq_lens"]
    caches = draw(*CACHE), draw(*CACHE)

    def attend(query):
        return jaxkv.paged_attention(query, caches, tables, lens)

    assert_compiled_once(lambda: jax.vmap(jax.vmap(attend))(query))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["flash", "token and head", "diffkv", "rope", "attention", "gather"])
def test_heads_over_devices(name, kind):
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        arrays = arrays_of(name)
        for n, x in arrays.items():
            split = {"key": 1, "value": 1, "query": 1, "v_scale": 0}.get(n, 2 if n in CACHES else None)
            spec = P(*("tp" if axis == split else None for axis in range(x.ndim)))
            arrays[n] = jax.device_put(x, NamedSharding(mesh, spec))
        assert_compiled_once(call, name, arrays)


@pytest.mark.parametrize("options", [
    {}, {"kv_cache_dtype": "fp8", "k_scale": 0.5}, {"kv_cache_dtype": "int8", "per_token_head": True},
    {"layout": "MLA", "num_heads": 1, "head_size_v": 12}, {"layout": "PACKED_NHD", "num_layers": 2},
], ids=str)  # fmt: skip
def test_a_cache(options):
    def use():
        cache = jaxkv.PagedKVCache.create(
            **(dict(num_blocks=4, block_size=4, num_heads=HEADS, head_size=DIM, dtype="float32") | options)
        )
        layer = {"layer": jnp.array(1)} if "num_layers" in options else {}
        rows = (draw(3, 12), draw(3, 4)) if cache.spec.layout.latent else (ROWS["key"], ROWS["value"])
        cache = cache.write(*rows, ROWS["slot_mapping"], **layer)
        return cache, cache.attend(draw(2, 4, DIM), **TABLES, **layer), cache.gather(**TABLES, max_len=5, **layer)

    assert_compiled_once(use)
