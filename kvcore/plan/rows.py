"""Token rows and scales, as the kernels that move them get them: as constexprs."""

import struct
from typing import NamedTuple

from kvcore.arrays import ArraySpec, HeadGroups
from kvcore.formats import DS_MLA_SMALLEST_SCALE, FP8_DS_MLA, SMALLEST_SCALE, FloatFormat
from kvcore.placement import Address, Placement
from kvcore.plan.kernel import Target
from kvcore.scales import Scales


class Rows(NamedTuple):
    """Token rows of K, or of V: where they lie in the array of tokens, and in the cache. A constexpr of the kernels.

    A token row is one token's `num_heads * head_units` stored units. Where heads follow each other without gaps, in the
    array of tokens and in the cache, they are described as one long head. Strides count elements of the array of
    tokens, `address` counts stored units.
    """

    num_heads: int
    head_units: int
    elements_per_unit: int
    scale_stride: int  # from one head's static scale to the next; 0: one for all
    layer_scale_stride: int  # from one layer's static scales to the next; 0: the same for all
    offset: int  # of the first token's first element
    token_stride: int  # the array of tokens: [num_tokens, num_heads, head_size]
    head_stride: int
    dim_stride: int
    groups: HeadGroups | None  # heads that lie in groups, else None
    address: Address
    columns: int  # units of a token row that a program takes, a power of two
    wide: bool  # whether offsets within a token row need 64 bits


class ScaleRows(NamedTuple):
    """Computed scales of K, or of V: where they lie, and how they are computed. A constexpr of the kernels."""

    group: int  # elements of a head that share one
    address: Address  # in scales
    inside: bool  # whether they lie in the cache's memory
    format: FloatFormat  # of a scale: float32 or e4m3
    largest: float  # the largest magnitude of the format of the elements
    least: int  # float32 bits of the magnitude below which the scale is 1, or of the least power of two
    power_of_two: bool  # whether scales are rounded up to powers of two, and NaN is no magnitude


def scale_rows(scales: Scales, address: Address, head_size: int, stored: FloatFormat) -> ScaleRows:
    """The scales at an address, of elements in a format.

    Args:
        scales: What the cache has.
        address: Where those of K, or of V, are.
        head_size: How many elements share a scale where each head has one: all of a head, or, where the scale is
            computed, all that a tile has for a head.
        stored: Format of the elements.
    """
    powers = stored == FP8_DS_MLA
    least = DS_MLA_SMALLEST_SCALE if powers else stored.largest * SMALLEST_SCALE
    return ScaleRows(
        group=head_size if scales.group is None else scales.group,
        address=address,
        inside=scales.inside,
        format=scales.format,
        largest=stored.largest,
        least=struct.unpack("<I", struct.pack("<f", least))[0],
        power_of_two=powers,
    )


def plan_tile(placement: Placement, elements: int, target: Target) -> tuple[int, int]:
    """Tokens and columns of a program that moves about `elements` stored units of token rows. Measured on an H100.

    A program takes as many columns of K as of V, also where their token rows differ, so that a thread moves 16 bytes of
    each. Columns are the power of two that covers a token row, up to a limit: threads without an element cost less than
    narrow accesses or more programs would.
    """
    extents, key, value = placement
    row = power_of_two(extents.num_heads * max(extents.head_units, extents.head_units_v))
    if target.backend == "interpret":
        return 32, min(row, 1024)  # a program costs milliseconds, an element next to nothing
    if value.slot == 1 or key.slot == key.x:
        # Slots are innermost: neighbouring tokens share cache lines, so a program takes many tokens.
        return 16, min(row, 128)
    return max(1, elements // row), min(row, 2048)


def plan_warps(num_bytes: int, target: Target) -> int:
    """Warps of a program that moves so many bytes: a thread moves 16 at a time; more warps than that would idle."""
    return min(8, max(1, num_bytes // (16 * target.warp_size)))


def row_programs(*sides: Rows) -> int:
    """Programs that share the token rows of K and of V."""
    return max(-(-rows.num_heads * rows.head_units // rows.columns) for rows in sides)


def plan_rows(
    spec: ArraySpec,
    num_heads: int,
    head_units: int,
    address: Address,
    columns: int,
    elements_per_unit: int = 1,
    scale_strides: tuple[int, int] = (0, 0),
    merge: bool = True,
) -> Rows:
    """Token rows, as they lie in an array of tokens and in the cache.

    Args:
        spec: The array of tokens: `(num_tokens, num_heads, head_size)`.
        num_heads: KV heads.
        head_units: Stored units of a head.
        address: Where they lie in the cache.
        columns: Units of a token row that a program takes.
        elements_per_unit: 1 or 2.
        scale_strides: From one head's static scale to the next, and from one layer's; 0: one for all.
        merge: Whether heads without gaps may be described as one. They never are where each has a static scale.
    """
    token_stride, head_stride, dim_stride = spec.steps
    scale_stride, layer_scale_stride = scale_strides
    head_reach = head_units * elements_per_unit * dim_stride
    in_a_row = spec.groups is None and head_stride == head_reach
    gapless = in_a_row and address.x == 1 and address.head == head_units * address.dim
    if gapless and merge and not scale_stride:
        heads, units = 1, num_heads * head_units
    else:
        heads, units = num_heads, head_units
    cache_reach = (num_heads - 1) * address.head + head_units * max(address.dim, address.x_stride)
    return Rows(
        num_heads=heads,
        head_units=units,
        elements_per_unit=elements_per_unit,
        scale_stride=scale_stride,
        layer_scale_stride=layer_scale_stride,
        offset=spec.offset,
        token_stride=token_stride,
        head_stride=head_stride,
        dim_stride=dim_stride,
        groups=spec.groups,
        address=address,
        columns=columns,
        wide=max(cache_reach, heads_reach(spec) + head_reach) >= 2**31,
    )


def heads_reach(spec: ArraySpec) -> int:
    """Elements of an array `[tokens, heads, dim]` from its first to the last that any of a token's heads begins at."""
    num_heads, head_stride = spec.shape[1], spec.steps[1]
    groups = spec.groups or HeadGroups(num_heads, 0)
    return spec.offset + num_heads // max(groups.size, 1) * groups.stride + groups.size * head_stride


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
