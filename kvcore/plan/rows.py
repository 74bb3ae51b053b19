"""Rows of tokens, as kernels that move them are told of them."""

import struct
from typing import NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.formats import DS_MLA_SMALLEST_SCALE, FP8_DS_MLA, SMALLEST_SCALE, FloatFormat
from kvcore.placement import Address, Placement
from kvcore.plan.kernel import Target
from kvcore.scales import Scales


class Rows(NamedTuple):
    """The rows of K, or of V: how they lie in the input and in the cache. A constexpr of the kernels.

    A row is one token's `num_heads * head_size` stored units: elements, or `pack` of them in a byte. Where heads follow
    each other without a gap on both sides, they are described as one long head. Strides count elements in the input
    and units in the cache.
    """

    num_heads: int
    head_size: int
    pack: int
    scale_stride: int  # from one head's static scale to the next; 0: one for all
    # input: [num_tokens, num_heads, head_size]
    token_stride: int
    input_head_stride: int
    input_dim_stride: int
    # cache: offset + layer·L + block·B + slot·S + head·H + (dim // x)·D + (dim % x)·X
    offset: int
    layer_stride: int
    block_stride: int
    slot_stride: int
    head_stride: int
    dim_stride: int
    x: int
    x_stride: int
    # tile
    columns: int  # units of a row that a program handles
    wide: bool  # whether offsets within a row need 64 bits


class ScaleRows(NamedTuple):
    """Where computed scales of K, or of V, are stored, and how they are computed. Strides count scales.

    A constexpr of the kernels.
    """

    group: int  # columns that share one
    offset: int
    layer_stride: int
    block_stride: int
    slot_stride: int
    head_stride: int
    dim_stride: int
    x: int
    x_stride: int
    inside: bool  # whether they lie in the cache's memory
    # how they are computed
    largest: float  # the magnitude that becomes the format's largest
    least: int  # float32 bits of the magnitude below which the scale is 1, or of the least scale that is a power of two
    power_of_two: bool  # whether scales are rounded up to one, and NaN is no magnitude
    # the fields of a FloatFormat, e4m3 or float32, that decoding a scale looks at
    bits: int
    mantissa_bits: int
    integer: bool
    unsigned_zero: bool


def scale_rows(scales: Scales, at: Address, width: int, stored: FloatFormat) -> ScaleRows:
    """Rows of the scales of heads that cover `width` columns."""
    powers = stored == FP8_DS_MLA
    least = DS_MLA_SMALLEST_SCALE if powers else stored.largest * SMALLEST_SCALE
    return ScaleRows(
        group=width if scales.group is None else scales.group,
        offset=at.offset,
        layer_stride=at.layer,
        block_stride=at.block,
        slot_stride=at.slot,
        head_stride=at.head,
        dim_stride=at.dim,
        x=at.x,
        x_stride=at.x_stride,
        inside=scales.inside,
        largest=stored.largest,
        least=struct.unpack("<I", struct.pack("<f", least))[0],
        power_of_two=powers,
        bits=scales.format.bits,
        mantissa_bits=scales.format.mantissa_bits,
        integer=False,
        unsigned_zero=False,
    )


def plan_tile(placement: Placement, elements: int, target: Target) -> tuple[int, int]:
    """Tokens and columns of a program that moves rows, about `elements` of them. Measured on an H100.

    K and V have as many columns, also where their rows differ, so that a thread moves 16 bytes of each. Columns are the
    power of two that covers a row: idle lanes cost less than narrow accesses or more programs would.
    """
    extents, key, value = placement
    row = power_of_two(extents.num_heads * max(extents.head_units, extents.head_units_v))
    if target.backend == "interpret":
        return 32, min(row, 1024)  # a program costs milliseconds, an element next to nothing
    if value.slot == 1 or key.slot == key.x:
        # Slots are innermost: neighbouring tokens share cache lines, so a program takes many tokens.
        return 16, min(row, 128)
    return max(1, elements // row), min(row, 2048)


def plan_warps(width: int, target: Target) -> int:
    """Warps of a program that moves `width` bytes. A thread moves 16 at a time; more warps than that would idle."""
    return min(8, max(1, width // (16 * target.warp_size)))


def row_programs(*sides: Rows) -> int:
    """Programs that share the rows of K and of V."""
    return max(-(-r.num_heads * r.head_size // r.columns) for r in sides)


def plan_rows(
    spec: ArraySpec,
    num_heads: int,
    head_size: int,
    at: Address,
    columns: int,
    pack: int = 1,
    scale_stride: int = 0,
    merge: bool = True,
) -> Rows:
    """Rows of tokens, as `spec` describes them, at an address of the cache.

    Args:
        spec: Of `(num_tokens, num_heads, …)`.
        num_heads: Heads.
        head_size: Stored units of a head.
        at: Where the cache has them.
        columns: Units of a row that a program handles.
        pack: Elements of a unit.
        scale_stride: Step from one head's static scale to the next.
        merge: Whether heads without gaps may become one; never where each has a scale.
    """
    token, head, dim = spec.steps
    gapless = merge and not scale_stride and at.x == 1 and at.head == head_size * at.dim
    gapless = gapless and head == head_size * pack * dim
    heads, size = (1, num_heads * head_size) if gapless else (num_heads, head_size)
    reach = max(
        (num_heads - 1) * at.head + head_size * max(at.dim, at.x_stride), num_heads * head + head_size * pack * dim
    )
    return Rows(
        num_heads=heads,
        head_size=size,
        pack=pack,
        scale_stride=scale_stride,
        token_stride=token,
        input_head_stride=head,
        input_dim_stride=dim,
        offset=at.offset,
        layer_stride=at.layer,
        block_stride=at.block,
        slot_stride=at.slot,
        head_stride=at.head,
        dim_stride=at.dim,
        x=at.x,
        x_stride=at.x_stride,
        columns=columns,
        wide=reach >= 2**31,
    )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
