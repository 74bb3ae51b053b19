"""What `paged_attention_kernel` knows when it is compiled. Nested NamedTuples of plain numbers: one constexpr."""

from typing import NamedTuple

from kvcore.arrays import HeadGroups
from kvcore.contract.cache import Cache
from kvcore.contract.read import AttentionOptions
from kvcore.formats import FloatFormat
from kvcore.placement import Address
from kvcore.plan.rows import ScaleRows


class QueryRows(NamedTuple):
    """How query and the arrays beside it lie in memory. Strides count elements."""

    num_heads: int
    num_kv_heads: int
    q_per_kv: int  # query heads that share a KV head
    offset: int  # query: of the first token's first element
    token_stride: int  # [num_tokens, num_heads, head_size]
    head_stride: int
    dim_stride: int
    groups: HeadGroups | None  # heads that lie in groups, else None
    table_step: int  # from one entry of a row of block_tables to the next
    lens_stride: int  # of seq_lens
    start_stride: int  # of query_start_loc
    sink_stride: int  # of sinks
    k_scale_stride: int  # from one head's static scale to the next; 0: one for all
    v_scale_stride: int
    k_layer_scale_stride: int  # from one layer's static scales to the next; 0: the same for all
    v_layer_scale_stride: int


class CacheRows(NamedTuple):
    """How the heads of K, of V or of the rotary part lie in the cache, and how a tile's columns cover them.

    A head is read in words: one stored unit each, or two bytes that lie side by side. `address` counts words.
    """

    units_per_word: int
    elements_per_word: int
    words: int  # of a head
    main: int  # columns of a tile, a power of two; a column is a word
    rest: int  # more columns, of K, where two powers of two cover a head with less waste (576 = 512 + 64); 0: none
    address: Address
    wide: bool  # whether offsets need 64 bits
    format: FloatFormat
    scales: ScaleRows | None  # those that were computed, or None


class Tile(NamedTuple):
    """What a program computes at once."""

    rows: int  # query rows
    positions: int
    stages: int  # of the pipeline: while one tile is computed, stages - 1 are loaded


class AttentionConstants(NamedTuple):
    """All constants of `paged_attention_kernel`.

    None may be called `value`: Triton 3.6 would read the attribute of that name which a constexpr has itself.
    """

    query: QueryRows
    k: CacheRows
    v: CacheRows
    rope: CacheRows | None  # the rotary part of fp8_ds_mla, which follows K's elements in a head of query
    v_in_k: bool  # whether V is the main piece of K, so that it is loaded once
    block_size: int
    layer_is_pointer: bool  # whether the layer's index is loaded from memory
    options: AttentionOptions
    ragged: bool  # whether sequences have any number of tokens, not one each
    by_row: bool  # whether rows of a program see different positions
    compute: FloatFormat  # in which K, V and weights are multiplied
    weight_bits: float  # weights are up to two to this power, not to 1
    out: FloatFormat | None  # to round results to with integers; None: the target's cast is good
    hardware: bool  # whether the target has the instructions that convert the cache's elements
    tile: Tile
    careful_tile: Tile  # of the second pass that infinite and NaN values need
    whole_tiles: bool  # whether tiles that all rows see wholly have a loop of their own, without masks
    split: bool  # whether axis 1 of the grid splits the positions
    min_tiles: int  # fewest tiles of a split
    heads_at_once: int  # KV heads, a divisor of their number: their programs are neighbours in the grid


_MARGIN = 2**16
"""A tile has a power of two of columns, so some lie past the end of a head. They are masked and read nothing, but their
offsets are computed, and must not overflow either."""


def cache_rows(
    cache: Cache,
    address: Address,
    stored: FloatFormat,
    units: int,
    units_per_word: int,
    tile: tuple[int, int],
    scales: ScaleRows | None,
) -> CacheRows:
    """Rows of heads at an address.

    Args:
        cache: What the heads are in.
        address: Where they lie in it; counts stored units.
        stored: What a unit holds.
        units: Stored units of a head.
        units_per_word: 1, or 2 where `address` lets two be read as one.
        tile: Columns, main and rest.
        scales: Computed scales, or None.
    """
    extents = cache.extents
    last = address.of(
        (extents.num_layers or 1) - 1, extents.num_blocks - 1, extents.block_size - 1, extents.num_heads - 1, units - 1
    )
    return CacheRows(
        units_per_word=units_per_word,
        elements_per_word=units_per_word * stored.elements_per_unit,
        words=units // units_per_word,
        main=tile[0],
        rest=tile[1],
        address=Address(
            offset=address.offset // units_per_word,
            layer=address.layer // units_per_word,
            block=address.block // units_per_word,
            slot=address.slot // units_per_word,
            head=address.head // units_per_word,
            dim=address.dim // units_per_word if address.x > 1 else address.dim,
            x=address.x // units_per_word if address.x > 1 else 1,
            x_stride=address.x_stride if address.x > 1 else 0,
        ),
        wide=last + _MARGIN >= 2**31,
        format=stored,
        scales=scales,
    )


def choose_word(stored: FloatFormat, address: Address, units: int) -> int:
    """Stored units of a word: two bytes that lie side by side, at an even address, are read as one."""
    side_by_side = address.x_stride == 1 if address.x > 1 else address.dim == 1
    strides = [address.offset, address.layer, address.block, address.slot, address.head]
    if address.x > 1:
        strides += [address.dim, address.x]
    even = units % 2 == 0 and all(stride % 2 == 0 for stride in strides)
    return 2 if stored.bits <= 8 and side_by_side and even and units >= 32 else 1
