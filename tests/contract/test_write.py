import jax
import numpy as np
import pytest

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.read import AttentionOptions, check_attention
from kvcore.contract.write import check_write
from kvcore.layout import CacheLayout
from tests.cases.bad_writes import BAD, stacked, valid
from tests.cases.write_ways import WAYS, assert_caches, assert_writes, cache_names

# ---- one table of bad calls, and five ways to make them


# Each way calls an op with NumPy arrays and gives what the caches hold afterwards, also if the call raises.


# JAX converts integers of other widths: see test_jax_arguments.py.
TORCH_ONLY = ("int16 slots", "uint32 slots", "layer array of int8")


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in BAD for way in WAYS if name not in TORCH_ONLY or "torch" in way]
)
def test_bad_input(name, way, launches):
    op, changes, kind, message = BAD[name]
    arguments, left = valid(op) | changes, {}
    with jax.enable_x64(True), pytest.raises(kind) as error:
        WAYS[way](op, arguments, left)
    assert type(error.value) is kind
    assert str(error.value) == message
    assert not launches
    assert_caches(left, {name: arguments[name] for name in cache_names(op)})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", ["flash", "diffkv"])
def test_the_calls_that_bad_ones_differ_from_are_good(op, way):
    assert_writes(way, op, valid(op))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", [0, 1, np.int32(1), np.int64(1), np.array(1, np.int32), np.array([1])], ids=repr)
def test_layers_of_every_type(layer, way):
    assert_writes(way, "flash", valid("flash") | stacked | {"layer": layer})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "layout", [None, "NHD", "block slot head dim", " block  slot head dim", CacheLayout.NHD], ids=repr
)
def test_layouts_of_every_type(layout, way):
    assert_writes(way, "flash", valid("flash") | ({} if layout is None else {"layout": layout}))


def test_head_major_caches_of_all_layers_are_the_default_where_keys_have_an_axis_more():
    key = ArraySpec((5, 3, 16), "bfloat16")
    caches = [ArraySpec((2, 6, 3, 2, 4, 8), "bfloat16"), ArraySpec((2, 6, 3, 16, 4), "bfloat16")]
    write = check_write(key, key, ArraySpec((5,), "int32"), CacheArguments(caches, layer=1))
    assert write.cache.layout == CacheLayout.HEAD_MAJOR.with_layer()


@pytest.mark.parametrize("scale", [None, 1.0])
def test_heads_of_nothing_are_refused_in_reading(scale):
    caches = CacheArguments([ArraySpec((6, 4, 3, 0), "bfloat16")] * 2)
    integers = ArraySpec((2, 3), "int32"), ArraySpec((2,), "int32"), None, None
    with pytest.raises(ValueError, match=r"^query must have a head_size of at least 1, got shape \(2, 3, 0\)$"):
        check_attention(
            ArraySpec((2, 3, 0), "bfloat16"), *integers, AttentionOptions(scale, True, None, None), caches, None
        )
