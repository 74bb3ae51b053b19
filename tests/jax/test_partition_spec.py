"""Partition specs of layouts and of whole caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.layout import CacheLayout

SPLIT = {"heads": "tp", "blocks": "dp", "layers": "pp"}


@pytest.mark.parametrize(("layout", "specs"), [
    ("NHD", [("dp", None, "tp", None)] * 2),
    ("HEAD_MAJOR", [("dp", "tp", None, None, None), ("dp", "tp", None, None)]),
    ("PALLAS", [("tp", "dp", None, None)] * 2),
    ("KV_NHD", [(None, "dp", None, "tp", None)]),
    ("INTERLEAVED", [("dp", None, "tp", None)]),
    ("MLA", [("dp", None, None)]),
    ("block layer head slot k+v", [("dp", "pp", "tp", None, None)]),
])  # fmt: skip
def test_specs_of_layouts(layout, specs):
    layout = CacheLayout.of(layout)
    split = {name: over for name, over in SPLIT.items() if name != "layers" or layout.has_layer}
    assert layout.partition_spec(**split) == tuple(specs)
    assert layout.partition_spec() == tuple((None,) * len(spec) for spec in specs)


def test_several_mesh_axes():
    assert CacheLayout.NHD.partition_spec(heads=("kv", "rank"))[0] == (None, None, ("kv", "rank"), None)


@pytest.mark.parametrize(("layout", "split", "axis"), [
    ("NHD", {"layers": "pp"}, "layer"), ("block slot (kv head) dim", {"heads": "pp"}, "head"),
    ("(kv block) slot head dim", {"blocks": "pp"}, "block"),
])  # fmt: skip
def test_what_the_layout_does_not_have_cannot_be_split(layout, split, axis):
    layout = CacheLayout.of(layout)
    with pytest.raises(ValueError, match=r"^layout ") as error:
        layout.partition_spec(**split)
    assert str(error.value) == f"layout '{layout}' must have an axis {axis} to be split over 'pp', got none"


SIZES = dict(num_blocks=4, block_size=4, num_heads=4, head_size=32, num_layers=2, dtype="float32")


@pytest.mark.parametrize("options", [
    {}, {"layout": "KV_NHD"}, {"layout": "MLA", "num_heads": 1, "head_size_v": 16},
    {"kv_cache_dtype": "int8", "per_token_head": True, "scale_layout": "block head layer slot"},
    {"kv_cache_dtype": "fp8", "k_scale": 0.5, "v_scale": np.ones(4, np.float32)},
    {"kv_cache_dtype": "fp8", "k_scale": np.ones((2, 1), np.float32), "v_scale": np.ones((2, 4), np.float32)},
])  # fmt: skip
def test_specs_of_caches_are_what_the_arrays_can_have(options):
    mesh = jax.make_mesh((2, 2, 2), ("pp", "dp", "tp"), axis_types=(AxisType.Auto,) * 3)
    cache = jaxkv.PagedKVCache.create(**SIZES | options)
    specs = cache.partition_spec(**SPLIT)
    assert jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, P)) == jax.tree.structure(cache)
    placed = jax.device_put(cache, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    for array, spec in zip(jax.tree.leaves(placed), jax.tree.leaves(specs), strict=True):
        named = {name for name in spec if name is not None}
        parts = 2 ** len(named)
        assert array.addressable_shards[0].data.size * parts == array.size
        if array.ndim > 2:  # no static scale
            assert named == {"pp", "dp"} | (set() if cache.spec.layout.latent else {"tp"})
    if options.get("per_token_head"):
        assert specs.k_scale == P("dp", "tp", "pp", None)
    if "v_scale" in options:
        of_layers = np.ndim(options["v_scale"]) == 2
        assert tuple(specs.k_scale) == (("pp", None) if of_layers else ())
        assert tuple(specs.v_scale) == (("pp",) if of_layers else ()) + ("tp",)


def test_a_cache_is_made_where_it_is_to_be():
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(AxisType.Auto,))

    def make():
        return jaxkv.PagedKVCache.create(**SIZES | {"num_heads": 8})

    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), jax.eval_shape(make).partition_spec(heads="tp")
    )  # fmt: skip
    cache = jax.jit(make, out_shardings=shardings)()
    assert cache.caches[1].sharding.spec == P(None, None, None, "tp", None)
    assert cache.caches[1].dtype == jnp.float32
