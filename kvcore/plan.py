"""Launch plans: a write and a target → grid, tile, warps and kernel arguments, as plain integers.

Both frameworks launch what a plan says, so that they provably start the same kernel with the same arguments. Plans
depend on shapes, strides and dtypes only, never on data.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.checks import ArraySpec
from kvcore.contract import Write
from kvcore.layout import Address, Placement
from kvcore.quantization import DS_MLA_SMALLEST_SCALE, E4M3, E5M2, FLOATS, FP8_DS_MLA, SMALLEST_SCALE, FloatFormat
from kvcore.scales import Scales


class Target(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        backend: "cuda", "hip" or "interpret".
        arch: Compute capability as an integer (90), or the name of a gfx architecture.
        warp_size: Threads that run in step.
    """

    backend: str
    arch: int | str
    warp_size: int = 32


INTERPRETER = Target("interpret", 0)


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


EXACT = {"enable_fp_fusion": False}
"""Options for arithmetic that is exact as written: a fused multiply-add would round once where it rounds twice."""


class KernelPlan(NamedTuple):
    """A kernel, and all that its compilation depends on but for the types of its pointers.

    Attributes:
        module: Name of its module in `kvcore.kernels`.
        name: Its name there.
        num_warps: Warps per program.
        scalars: Its run-time integers, which follow the pointers, and their types.
        constexprs: Its compile-time arguments, by name.
        options: Options of the compiler.
    """

    module: str
    name: str
    num_warps: int
    scalars: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]


class WritePlan(NamedTuple):
    """How to launch a write.

    Attributes:
        kernel: What to launch.
        token_rows: Rows of a token: 1, or its heads.
        rows: Rows per program.
        row_programs: Programs that share a row.
    """

    kernel: KernelPlan
    token_rows: int
    rows: int
    row_programs: int

    def grid(self, num_tokens: int) -> tuple[int, int, int]:
        """Programs along each axis for `num_tokens` entries of slot_mapping."""
        return -(-num_tokens * self.token_rows // self.rows), self.row_programs, 1


SCALARS = {"num_tokens": "i32", "num_slots": "i64", "num_layers": "i32"}
"""Run-time integers that follow the pointers, in the kernels' order, and their types."""


def pointers(write: Write) -> tuple[str, ...]:
    """Names of a kernel's pointer arguments, in order. All but the first three and slot_mapping_ptr may be None."""
    caches = ("kv_cache_ptr",) if write.layout.single_array else ("key_cache_ptr", "value_cache_ptr")
    if write.by_head:
        caches = ("key_cache_ptr", "value_cache_ptr", "k_scale_cache_ptr", "v_scale_cache_ptr")
    return ("key_ptr", "value_ptr", *caches, "slot_mapping_ptr", "k_scale_ptr", "v_scale_ptr", "layer")


def arguments(
    write: Write,
    key: Any,
    value: Any,
    caches: Sequence[Any],
    scale_caches: Sequence[Any],
    slot_mapping: Any,
    k_scale: Any,
    v_scale: Any,
    layer: Any,
) -> list[Any]:
    """What the kernel gets for `pointers`: arrays, or whatever stands for them. None for scales without effect."""
    memory = list(caches)
    if write.by_head:
        memory = [*caches, None][:2] + [*scale_caches, None, None][:2]
    scales = (k_scale, v_scale) if write.scaled else (None, None)
    return [key, value, *memory, slot_mapping, *scales, layer]


def scalars(write: Write, num_tokens: int) -> tuple[int, int, int]:
    """Values of `SCALARS`. `num_tokens` is the length of slot_mapping."""
    extents = write.placement.extents
    return num_tokens, extents.num_slots, extents.num_layers or 1


@lru_cache(maxsize=4096)
def plan_write(write: Write, target: Target, layer_is_pointer: bool = False) -> WritePlan:
    """The plan for a write on a target.

    Args:
        write: From `kvcore.contract.check_write`. Its number of tokens does not matter.
        target: What to compile for.
        layer_is_pointer: Whether the kernel loads the layer's index from memory.
    """
    if write.by_head:
        return _plan_by_head(write, target, layer_is_pointer)
    extents, pack = write.placement.extents, write.format.per_byte
    # Twice the tokens where stores are half as wide as loads.
    elements = 2048 if write.format.bits < 8 * _itemsize(write.key.dtype) else 1024
    tokens, columns = plan_tile(write.placement, elements // pack, target)
    key = plan_rows(write.key, extents.num_heads, extents.head_size, write.placement.key, columns, pack)
    value = plan_rows(write.value, extents.num_heads, extents.head_size_v, write.placement.value, columns, pack)
    kernel = KernelPlan(
        module="reshape_and_cache",
        name="reshape_and_cache_kernel_flash" + ("_diffkv" if write.layout.single_array else ""),
        num_warps=plan_warps(tokens * columns * pack * _itemsize(write.key.dtype), target),
        scalars=SCALARS,
        constexprs={
            "K": key,
            "V": value,
            "BLOCK_SIZE": extents.block_size,
            "SLOT_STRIDE": write.slot_mapping.steps[0],
            "FORMAT": None if write.copies else write.format,
            "HARDWARE_FP8": _converts_exactly(write.format, target),
            "LAYER_IS_POINTER": layer_is_pointer,
            "TOKENS": tokens,
        },
        options=EXACT,
    )
    return WritePlan(kernel, 1, tokens, row_programs(key, value))


def _plan_by_head(write: Write, target: Target, layer_is_pointer: bool) -> WritePlan:
    """The plan for a write whose heads have a scale each: a program takes whole heads."""
    extents, scales = write.placement.extents, write.scales
    k_step, v_step = write.head_scales if write.scaled else (0, 0)
    at, heads = write.placement, extents.num_heads
    pack, pack_v = write.format.per_byte, write.format_v.per_byte
    widths = [max(16, power_of_two(size * n)) for size, n in ((extents.head_size, pack), (extents.head_size_v, pack_v))]
    # Measured on an H100: few rows, and 16 elements a thread, so that what rows share is computed less often.
    rows = max(1, (65536 if target.backend == "interpret" else 1024) // max(widths))
    key = plan_rows(write.key, heads, extents.head_size, at.key, widths[0] // pack, pack, k_step, merge=False)
    value = plan_rows(
        write.value, heads, extents.head_size_v, at.value, widths[1] // pack_v, pack_v, v_step, merge=False
    )
    key_scales = value_scales = None
    if scales is not None:
        key_scales = scale_rows(scales, scales.placement.key, widths[0], write.format)
        if write.format_v == write.format:
            value_scales = scale_rows(scales, scales.placement.value, widths[1], write.format)
    kernel = KernelPlan(
        module="quantize_and_cache",
        name="quantize_and_cache_kernel",
        num_warps=plan_warps(rows * max(widths), target),
        scalars=SCALARS,
        constexprs={
            "K": key,
            "V": value,
            "KS": key_scales,
            "VS": value_scales,
            "BLOCK_SIZE": extents.block_size,
            "SLOT_STRIDE": write.slot_mapping.steps[0],
            "FORMAT": write.format,
            "FORMAT_V": None if write.format_v.name == write.value.dtype else write.format_v,
            "SCALE_FORMAT": None if scales is None else scales.format,
            "HARDWARE_FP8": _converts_exactly(write.format, target),
            "HARDWARE_SCALES": scales is not None and _converts_exactly(scales.format, target),
            "LAYER_IS_POINTER": layer_is_pointer,
            "ROWS": rows,
        },
        options=EXACT,
    )
    return WritePlan(kernel, heads, rows, 1)


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
    row = power_of_two(extents.num_heads * max(extents.head_size, extents.head_size_v))
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


def has_e4m3(target: Target) -> bool:
    """Whether the target converts e4m3 to other floats, which is exact."""
    return target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 89


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _converts_exactly(stored: FloatFormat, target: Target) -> bool:
    """Whether the compiler's cast from float32 saturates and rounds once, to nearest even.

    True from sm_90 on (checked over all 2³² patterns on an H100). sm_89 rounds twice before Triton 3.9, sm_80 has no
    instruction, and the interpreter truncates: there the kernels encode with integer arithmetic.
    """
    converts = stored._replace(name="") in (E4M3._replace(name=""), E5M2._replace(name=""))
    return converts and target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 90


def _itemsize(dtype: str) -> int:
    return FLOATS[dtype].bits // 8 if dtype in FLOATS else 1
