"""CacheLayout.place and describe: arrays that do not fit, strides, and what a person reads."""

import numpy as np
import pytest

from kvcore.layout import CacheLayout
from kvcore.placement import Address

PLACED = {
    "rank": (
        "NHD", [(7, 16, 24), (7, 16, 3, 24)], {},
        "key_cache must have 4 axes (block slot head dim), got shape (7, 16, 24)",
    ),
    "rank of the value cache": (
        "HEAD_MAJOR", [(7, 3, 3, 16, 8), (7, 3, 3, 16, 8)], {},
        "value_cache must have 4 axes (block head dim slot), got shape (7, 3, 3, 16, 8)",
    ),
    "rank of a single array": (
        "INTERLEAVED", [(7, 16, 3, 2, 24)], {},
        "kv_cache must have 4 axes (block slot (head kv) dim), got shape (7, 16, 3, 2, 24)",
    ),
    "names": (
        "NHD", [(7, 16, 3, 24), (7, 16, 3)], {"names": ("k", "v")},
        "v must have 4 axes (block slot head dim), got shape (7, 16, 3)",
    ),
    "odd heads": (
        "INTERLEAVED", [(7, 16, 3, 24)], {}, "kv_cache axis (head kv) must have an even size, got 3",
    ),
    "kv of 3": ("KV_NHD", [(3, 7, 16, 3, 24)], {}, "kv_cache axis kv must have size 2, got 3"),
    "kv of 1": ("BLOCK_KV_HND", [(7, 1, 3, 16, 24)], {}, "kv_cache axis kv must have size 2, got 1"),
    "no head_size": (
        "PACKED_NHD", [(7, 16, 3, 34)], {},
        "layout 'block slot head k+v' needs head_size to split axis k+v, got None",
    ),
    "head_size takes all": (
        "PACKED_NHD", [(7, 16, 3, 34)], {"head_size": 34},
        "kv_cache axis k+v must have a size above head_size = 34, got 34",
    ),
    "blocks differ": (
        "NHD", [(7, 16, 3, 24), (8, 16, 3, 24)], {},
        "value_cache axis block must have size 7, as in key_cache, got 8",
    ),
    "slots differ": (
        "HEAD_MAJOR", [(7, 3, 3, 16, 8), (7, 3, 24, 15)], {},
        "value_cache axis slot must have size 16, as in key_cache, got 15",
    ),
    "heads differ": (
        "HND", [(7, 3, 16, 24), (7, 4, 16, 24)], {},
        "value_cache axis head must have size 3, as in key_cache, got 4",
    ),
    "layers differ": (
        "layer block slot head dim", [(2, 7, 16, 3, 24), (1, 7, 16, 3, 24)], {},
        "value_cache axis layer must have size 2, as in key_cache, got 1",
    ),
    "blocks on one place": (
        "NHD", [(7, 16, 3, 24)] * 2, {"strides": [(0, 72, 24, 1), None]},
        "key_cache axis block with stride 0 puts its 7 elements in one place",
    ),
    "slots overlap heads": (
        "NHD", [(7, 16, 3, 24)] * 2, {"strides": [None, (1152, 71, 24, 1)]},
        "value_cache axis slot with stride 71 overlaps the axes inside it, which reach 72 elements",
    ),
    "K overlaps V": (
        "KV_NHD", [(2, 7, 16, 3, 24)], {"strides": [(8063, 1152, 72, 24, 1)]},
        "kv_cache axis kv with stride 8063 overlaps the axes inside it, which reach 8064 elements",
    ),
    "K overlaps V between heads": (
        "INTERLEAVED", [(7, 16, 6, 24)], {"strides": [(6 * 16 * 24, 6 * 24, 20, 1)]},
        "kv_cache axis kv with stride 20 overlaps the axes inside it, which reach 24 elements",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "shapes", "more", "message"), PLACED.values(), ids=PLACED)
def test_arrays_that_do_not_fit(layout, shapes, more, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        CacheLayout.of(layout).place(shapes, **more)
    assert str(error.value) == message


def test_strides_of_axes_of_size_1_do_not_matter():
    placement = CacheLayout.NHD.place([(1, 4, 1, 8)] * 2, [(0, 8, 3, 1), (1, 8, 0, 1)])
    assert placement.extents == (None, 1, 4, 1, 8, 8)


def test_key_and_value_cache_have_strides_of_their_own():
    placement = CacheLayout.NHD.place([(7, 4, 3, 8)] * 2, [(96, 24, 8, 1), (1000, 50, 10, 1)])
    assert placement.key == Address(0, 0, 96, 24, 8, 1, 1, 0)
    assert placement.value == Address(0, 0, 1000, 50, 10, 1, 1, 0)


def test_describe_two_arrays():
    assert CacheLayout.HND.describe(num_blocks=1024, block_size=16, num_heads=8, head_size=128) == (
        "key_cache    block 1024 × 16384 | head 8 × 2048 | slot 16 × 128 | dim 128 × 1\n"
        "value_cache  block 1024 × 16384 | head 8 × 2048 | slot 16 × 128 | dim 128 × 1"
    )


def test_describe_packed_runs():
    assert CacheLayout.HEAD_MAJOR.describe(num_blocks=2, block_size=16, num_heads=8, head_size=128, x=8) == (
        "key_cache    block 2 × 16384 | head 8 × 2048 | dim/x 16 × 128 | slot 16 × 8 | x 8 × 1\n"
        "value_cache  block 2 × 16384 | head 8 × 2048 | dim 128 × 16 | slot 16 × 1"
    )


def test_describe_single_arrays():
    sizes = {"num_blocks": 2, "block_size": 16, "num_heads": 8, "head_size": 128}
    assert CacheLayout.INTERLEAVED.describe(**sizes) == (
        "kv_cache  block 2 × 32768 | slot 16 × 2048 | (head kv) 16 × 128 | dim 128 × 1"
    )
    assert CacheLayout.PACKED_NHD.with_layer().describe(**sizes, head_size_v=64, num_layers=3) == (
        "kv_cache  layer 3 × 49152 | block 2 × 24576 | slot 16 × 1536 | head 8 × 192 | k+v 192 × 1"
    )


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32])
def test_extents_of_numpy_do_not_overflow(kind):
    sizes = {"num_blocks": 100, "block_size": 16, "num_heads": 90, "head_size": 120}
    for layout in (CacheLayout.INTERLEAVED, CacheLayout.PACKED_NHD):
        got = layout.shapes(**{n: kind(size) for n, size in sizes.items()})
        assert got == layout.shapes(**sizes)
        assert all(type(n) is int for shape in got for n in shape)
