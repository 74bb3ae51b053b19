"""Quantised writes in JAX, and the proof that they are in place."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.formats import KV_CACHE_DTYPES, stored_size
from tests.cases.arrays import bits, make_case, random_bits, random_normal

LAYERS = 3


KINDS = {
    "int8 of a head": dict(kv_cache_dtype="int8", scales="head"),
    "int8 of a layer and head": dict(kv_cache_dtype="int8", scales="layer and head", num_layers=LAYERS, layer=1),
    "int8 in int8": dict(kv_cache_dtype="int8", cache_dtype="int8"),
    "fnuz": dict(kv_cache_dtype="fp8_e4m3fnuz"),
    "int4": dict(kv_cache_dtype="int4"),
    "nvfp4": dict(kv_cache_dtype="nvfp4", scales="head"),
    "scale caches": dict(kv_cache_dtype="int4", per_token_head=True),
    "scale caches of fp8": dict(kv_cache_dtype="fp8_e5m2", per_token_head=True),
}


def case_of(kind, **more):
    options = dict(num_blocks=64, head_size=32) | KINDS[kind] | more
    return make_case(np.random.default_rng(0), **options)


def inputs_of(case):
    """The op's arrays, the ones that are written in the middle."""
    scales = [jnp.asarray(s, jnp.float32) for s in (case.k_scale, case.v_scale) if s is not None]
    slots = jnp.asarray(case.slot_mapping, jnp.int32)
    return jnp.asarray(case.key), jnp.asarray(case.value), tuple(map(jnp.asarray, case.memory)), slots, scales


def write(case, key, value, memory, slots, scales, layer=None):
    """The op, as a function of arrays; always a tuple."""
    layer = case.layer if layer is None else layer
    more = {"scale_layout": case.scale_layout} if case.scale_caches else {}
    new = case.op(jaxkv)(
        key, value, *memory, slots, case.kv_cache_dtype, *scales, layout=case.layout, layer=layer, **more
    )
    return new if isinstance(new, tuple) or new is None else (new,)


def assert_same(got, want):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(np.asarray(w)), err_msg=f"array {i}")


def assert_in_place(compiled, memory):
    """All arrays are aliased, and no temporary has half the size of the largest."""
    sizes = [a.size * a.dtype.itemsize for a in memory]
    found = compiled.memory_analysis()
    assert found.alias_size_in_bytes >= sum(sizes)
    assert found.temp_size_in_bytes < max(sizes) / 2


def latent_arrays(name, layers=(), dtype="bfloat16", num_blocks=32):
    rng = np.random.default_rng(1)
    units = stored_size(KV_CACHE_DTYPES[name], 576)
    cache = random_bits(rng, (*layers, num_blocks, 8, units), dtype if name == "auto" else "uint8")
    slots = np.array([3, -1, 255, 256, 0, 17, 16], np.int32)
    return random_bits(rng, (7, 512), dtype), random_bits(rng, (7, 64), dtype), cache, slots


def mesh_of(kind, devices=4):
    return jax.make_mesh((devices,), ("tp",), axis_types=(kind,))


def over_heads(mesh, axes):
    return NamedSharding(mesh, P(*("tp" if "head" in axis else None for axis in axes)))


def place(case, mesh):
    """The case's arrays on the mesh, heads split."""
    key, value, memory, slots, scales = inputs_of(case)
    pattern = case.scale_layout or ("layer " if case.layout.has_layer else "") + "block slot head"
    axes = [*case.layout.arrays, *[[(name,) for name in pattern.split()]] * len(case.scale_caches)]
    rows = NamedSharding(mesh, P(None, "tp", None))
    return (
        jax.device_put(key, rows),
        jax.device_put(value, rows),
        tuple(jax.device_put(a, over_heads(mesh, x)) for a, x in zip(memory, axes, strict=True)),
        jax.device_put(slots, NamedSharding(mesh, P(None))),
        [jax.device_put(s, NamedSharding(mesh, P(*[None] * (s.ndim - 1), *["tp"] * (s.ndim > 0)))) for s in scales],
    )


def draws(*shape):
    return random_normal(np.random.default_rng(sum(shape)), shape, "float32")
