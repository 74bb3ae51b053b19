"""Launch plans of the kernels that read a cache. As `kvcore.plan`: plain integers, from shapes, never from data."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.contract.read import Attention
from kvcore.formats import BFLOAT16, DS_MLA_ROPE, FLOAT16, FLOAT32, FLOATS, FP8_DS_MLA, NVFP4, FloatFormat
from kvcore.placement import Address, Extents
from kvcore.plan.kernel import KernelPlan, Target, has_e4m3
from kvcore.plan.rows import power_of_two, scale_rows


class QueryRows(NamedTuple):
    """How query, sequence lengths and starts lie in memory. Strides count elements. A constexpr of the kernels."""

    num_heads: int
    num_kv_heads: int
    group: int  # query heads that share a KV head
    token_stride: int
    head_stride: int
    dim_stride: int
    table_step: int  # from one entry of a row of block_tables to the next
    lens_stride: int
    start_stride: int
    sink_stride: int
    k_scale_stride: int  # from one head's static scale to the next; 0: one for all
    v_scale_stride: int


class CacheRows(NamedTuple):
    """How the rows of K, or of V, lie in the cache, and how a tile covers them. A constexpr of the kernels.

    All numbers count words: one stored unit, or two bytes, side by side. A tile's columns are `low`, a power of two,
    and for K possibly `high` more, likewise: 576 is 512 and 64.
    """

    pack: int  # elements of a word
    word: int  # stored units of a word
    head_size: int
    low: int
    high: int
    # offset + layer·L + block·B + slot·S + head·H + (dim // x)·D + (dim % x)·X
    offset: int
    layer_stride: int
    block_stride: int
    slot_stride: int
    head_stride: int
    dim_stride: int
    x: int
    x_stride: int
    wide: bool  # whether offsets need 64 bits


class AttentionPlan(NamedTuple):
    """How to launch `paged_attention_kernel` and, where positions are split, `merge_attention_kernel`.

    Attributes:
        attend: The kernel that attends.
        grid: Its programs along each axis.
        splits: Parts into which positions are split; they are merged if there are more than one.
        merge: The kernel that merges them.
        merge_grid: Its programs.
    """

    attend: KernelPlan
    grid: tuple[int, int, int]
    splits: int
    merge: KernelPlan
    merge_grid: tuple[int, int, int]


_FUSED = {"enable_fp_fusion": True}  # results are rounded, not bits to be kept

POINTERS = (
    "query_ptr", "key_cache_ptr", "value_cache_ptr", "block_tables_ptr", "seq_lens_ptr", "query_start_loc_ptr",
    "sinks_ptr", "k_scale_ptr", "v_scale_ptr", "layer",
)  # fmt: skip
"""Pointer arguments of `paged_attention_kernel`, in order. From query_start_loc_ptr on they may be None."""

SCALARS: dict[str, str] = dict.fromkeys(
    ("num_tokens", "num_seqs", "max_blocks", "table_stride", "num_blocks", "num_layers"), "i32"
)
"""Run-time integers that follow the pointers, and their types. Then come the results, out_ptr and lse_ptr."""

MERGE_POINTERS = ("part_ptr", "part_lse_ptr", "sinks_ptr")
"""Pointer arguments of `merge_attention_kernel`, in order. sinks_ptr may be None."""

MERGE_SCALARS = {"splits": "i32"}
"""Run-time integers that follow the pointers, and their types. Then come the results, out_ptr and lse_ptr."""


def arguments(
    call: Attention,
    query: Any,
    caches: Sequence[Any],
    block_tables: Any,
    seq_lens: Any,
    query_start_loc: Any,
    sinks: Any,
    k_scale: Any,
    v_scale: Any,
    layer: Any,
) -> list[Any]:
    """All that `paged_attention_kernel` is launched with but its results, in its order.

    These are values of `POINTERS`, then of `SCALARS`. The results follow: out and lse of the op or, where the plan
    splits positions, those of the parts, which `merge_arguments` begins with.

    Args:
        call: What the kernel does.
        query: The array, or whatever stands for it: an address, the dtype. So are all up to layer.
        caches: The key and the value cache, or the one array of both.
        block_tables: As it is passed to the op.
        seq_lens: As it is passed to the op.
        query_start_loc: As it is passed to the op.
        sinks: As it is passed to the op.
        k_scale: As it is passed to the op. The kernel gets None for a scale that has no effect.
        v_scale: As it is passed to the op.
        layer: The array of one index, or the index, or None.
    """
    scales = (k_scale, v_scale) if call.cache.scaled else (None, None)
    return [
        query, caches[0], caches[-1], block_tables, seq_lens, query_start_loc, sinks, *scales, layer, *scalars(call),
    ]  # fmt: skip


def scalars(call: Attention) -> tuple[int, ...]:
    """Values of `SCALARS`."""
    extents, tables = call.cache.extents, call.block_tables
    num_seqs, max_blocks = tables.shape
    return call.query.shape[0], num_seqs, max_blocks, tables.steps[0], extents.num_blocks, extents.num_layers or 1


def merge_arguments(part: Any, part_lse: Any, sinks: Any, splits: int) -> list[Any]:
    """All that `merge_attention_kernel` is launched with but its results, in its order.

    These are values of `MERGE_POINTERS`, then of `MERGE_SCALARS`. The results follow: out and lse of the op.
    """
    return [part, part_lse, sinks, splits]


_SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that a program may have, by compute capability."""

_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of the usual GPU of a compute capability. They set how finely positions are split, never what is computed."""


@lru_cache(maxsize=4096)
def plan_attention(
    call: Attention, target: Target, layer_is_pointer: bool = False, even_addresses: bool = True
) -> AttentionPlan:
    """The plan for attention on a target.

    Args:
        call: From `kvcore.contract.read.check_attention`.
        target: What to compile for.
        layer_is_pointer: Whether the kernel loads the layer's index from memory.
        even_addresses: Whether the caches begin at even addresses.
    """
    extents, options = call.cache.extents, call.options
    tokens, q_heads, _ = call.query.shape
    cache, elements_per_unit = call.cache, call.cache.format.elements_per_unit
    sequences = call.block_tables.shape[0]
    max_len = call.block_tables.shape[1] * extents.block_size
    group = q_heads // extents.num_heads
    interpreted = target.backend == "interpret"
    compute = _compute(call, interpreted)
    rows, tile, stages, warps = _tile(call, target, compute)
    # Tiles of rows: at most one more than full ones for each sequence, and for what is before and after them.
    ragged = call.query_start_loc is not None
    tiles = tokens * group // rows + sequences + 2 if ragged else sequences * -(-group // rows)
    programs = tiles * extents.num_heads
    min_tiles = max(1, 256 // tile)
    splits = _splits(programs, -(-max_len // tile), min_tiles, target)
    key, value = cache.placement[1:]
    sides = ((key, extents.head_units), (value, extents.head_units_v))
    words = [_word(call, at, size) if even_addresses else 1 for at, size in sides]
    if cache.layout.latent:  # V is a part of K's tile
        words = [min(words)] * 2
    word, word_v = words
    low, high = _pieces(extents.head_units // word)
    rope = None
    if cache.rope is not None:
        low, high = extents.head_units // word, DS_MLA_ROPE
        rope = _cache_rows(extents, cache.rope, DS_MLA_ROPE, 1, 1, high, 0)
    low_v = max(16, power_of_two(extents.head_units_v // word_v))
    v_in_k = cache.layout.latent and extents.head_units_v == low * word
    key_scales = value_scales = None
    if cache.scales is not None:
        key_scales = scale_rows(cache.scales, cache.scales.placement.key, cache.head_size, cache.format)
        value_scales = scale_rows(cache.scales, cache.scales.placement.value, cache.head_size_v, cache.format)
    out = FLOATS[call.query.dtype] if interpreted else None
    compiling: dict[str, Any] = dict(_FUSED)
    if rows == 128 and warps == 8 and compute.bits == 16 and target.backend == "cuda":
        compiling["maxnreg"] = 128  # so that two programs fit on a multiprocessor
    attend = KernelPlan(
        module="attention",
        name="paged_attention_kernel",
        num_warps=warps,
        scalars=SCALARS,
        constexprs={
            "Q": QueryRows(
                num_heads=q_heads,
                num_kv_heads=extents.num_heads,
                group=group,
                token_stride=call.query.steps[0],
                head_stride=call.query.steps[1],
                dim_stride=call.query.steps[2],
                table_step=call.block_tables.steps[1],
                lens_stride=_stride(call.seq_lens),
                start_stride=_stride(call.query_start_loc),
                sink_stride=_stride(call.sinks),
                k_scale_stride=cache.head_scales[0],
                v_scale_stride=cache.head_scales[1],
            ),
            "K": _cache_rows(extents, key, extents.head_units, word, elements_per_unit, low, high),
            "V": _cache_rows(extents, value, extents.head_units_v, word_v, elements_per_unit, low_v, 0),
            "HIGH": rope,
            "KS": key_scales,
            "VS": value_scales,
            "CACHE": cache.format,
            "HIGH_FORMAT": BFLOAT16,
            "COMPUTE": compute,
            "OUT": out,
            "BLOCK_SIZE": extents.block_size,
            "SCALE": options.scale,
            "CAUSAL": options.causal,
            "WINDOW": options.sliding_window,
            "SOFT_CAP": options.soft_cap,
            "V_IN_K": v_in_k,
            "HARDWARE": _converts_in_hardware(cache.format, target),
            "LAYER_IS_POINTER": layer_is_pointer,
            "ROWS": rows,
            "TILE": tile,
            "STAGES": stages,
            "SPLIT": splits > 1,
            "MIN_TILES": min_tiles,
            "UNMASKED": ragged and rows > 16 and options.sliding_window is None,
        },
        options=compiling,
    )
    merge = KernelPlan(
        module="attention",
        name="merge_attention_kernel",
        num_warps=4,
        scalars=MERGE_SCALARS,
        constexprs={
            "NUM_HEADS": q_heads,
            "HEAD_SIZE": cache.head_size_v,
            "SINK_STRIDE": _stride(call.sinks),
            "OUT": out,
            "PARTS": 16,
            "COLUMNS": power_of_two(cache.head_size_v),
        },
        options=_FUSED,
    )
    return AttentionPlan(attend, (programs, splits, 1), splits, merge, (tokens * q_heads, 1, 1))


def _compute(call: Attention, interpreted: bool) -> FloatFormat:
    """What K, V and weights are multiplied in: query's dtype, unless the cache has numbers that it lacks."""
    query, cache = FLOATS[call.query.dtype], call.cache.format
    if interpreted or (cache.name in FLOATS and cache != query):
        return FLOAT32
    if cache == FP8_DS_MLA:  # scaled elements have float32's range
        return BFLOAT16 if query == BFLOAT16 else FLOAT32
    # The hardware turns quantised elements into float16. Rows of query are brought into its range.
    return FLOAT16 if cache.name not in FLOATS and query.bits == 16 else query


def _converts_in_hardware(stored: FloatFormat, target: Target) -> bool:
    """Whether the target has the instructions with which `kvcore.kernels.decode` converts a format to float16."""
    if stored.integer or stored == NVFP4:
        return target.backend == "cuda"
    return has_e4m3(target)


def _tile(call: Attention, target: Target, compute: FloatFormat) -> tuple[int, int, int, int]:
    """Rows, positions, stages and warps of a program. Measured on an H100: see docs/benchmarks.md."""
    extents = call.cache.extents
    tokens, q_heads, head_size = call.query.shape
    group = q_heads // extents.num_heads
    widest = max(head_size, call.cache.head_size_v)
    # A sequence's rows on average: few of them wait for memory, many of them for the tensor cores.
    average = group * -(-tokens // max(call.block_tables.shape[0], 1))
    most = 128 if widest <= 256 else 64
    rows = min(most, max(16, power_of_two(average)))
    if target.backend == "interpret":
        return rows, 64, 1, 1  # a tile costs milliseconds, an element next to nothing
    if compute.bits == 32:  # no tensor cores, so that nothing is lost
        rows, tile, stages, warps = min(rows, 32), 32, 4, 4
    elif widest > 256:
        tile, stages, warps = 64, 2, 8
    elif rows >= 64:
        rows, tile, stages, warps = (128, 64, 3, 8) if widest <= 128 else (64, 32, 3, 4)
    elif widest <= 128 and rows == 16:
        tile, stages, warps = {16: (64, 4, 2), 8: (128, 4, 4), 4: (128, 2, 4)}[call.cache.format.bits]
    else:
        tile, stages, warps = 64 if widest <= 128 else 32, 4, 4
    # What does not fit in shared memory has fewer stages, then smaller tiles, then fewer rows.
    cuda = target.backend == "cuda" and isinstance(target.arch, int)
    budget = 1024 * (_SHARED_MEMORY.get(int(target.arch), 99) if cuda else 64)
    if not cuda or int(target.arch) < 90:
        budget -= budget // 8  # weights, too, go through it to the tensor cores
    columns = sum(_pieces(head_size)) + (0 if call.cache.layout.latent else power_of_two(call.cache.head_size_v))
    row = sum(_pieces(head_size)) * compute.bits // 8
    position = columns * call.cache.format.bits // 8
    # Elements that are multiplied by their scales go back there, as COMPUTE, for K and for V.
    scaled = 2 * row if call.cache.rope is not None else 0
    while rows * row + tile * (stages * position + scaled) > budget and (stages, tile, rows) != (1, 16, 16):
        if stages > 2 or (stages == 2 and tile == 16):
            stages -= 1
        elif tile > 16:
            tile //= 2
        else:
            rows //= 2
    return rows, tile, stages, warps


def _splits(programs: int, tiles: int, min_tiles: int, target: Target) -> int:
    """Parts of the positions: enough to keep all multiprocessors busy."""
    if target.backend == "interpret":
        return min(2, -(-tiles // min_tiles))
    wanted = 2 * _MULTIPROCESSORS.get(target.arch if isinstance(target.arch, int) else 0, 108)
    return max(1, min(wanted // max(programs, 1), -(-tiles // min_tiles)))


def _pieces(head_size: int) -> tuple[int, int]:
    """The powers of two that cover a head of K: one, or two where that saves columns."""
    whole = max(16, power_of_two(head_size))
    low = whole // 2
    high = max(16, power_of_two(head_size - low))
    return (low, high) if low >= 16 and low + high < whole else (whole, 0)


def _cache_rows(
    extents: Extents, at: Address, units: int, word: int, elements_per_unit: int, low: int, high: int
) -> CacheRows:
    """Rows of heads of `units` stored units, read in words of `word` of them."""
    last = at.of(
        (extents.num_layers or 1) - 1, extents.num_blocks - 1, extents.block_size - 1, extents.num_heads - 1, units - 1
    )
    return CacheRows(
        pack=word * elements_per_unit,
        word=word,
        head_size=units // word,
        low=low,
        high=high,
        offset=at.offset // word,
        layer_stride=at.layer // word,
        block_stride=at.block // word,
        slot_stride=at.slot // word,
        head_stride=at.head // word,
        dim_stride=at.dim // word if at.x > 1 else at.dim,
        x=at.x // word if at.x > 1 else 1,
        x_stride=at.x_stride if at.x > 1 else 0,
        wide=last + 2**16 >= 2**31,
    )


def _word(call: Attention, at: Address, units: int) -> int:
    """Stored units of a word: two bytes that lie side by side, at an even address, are loaded as one."""
    side_by_side = at.x_stride == 1 if at.x > 1 else at.dim == 1
    strides = (at.offset, at.layer, at.block, at.slot, at.head, *((at.dim, at.x) if at.x > 1 else ()))
    even = units % 2 == 0 and all(stride % 2 == 0 for stride in strides)
    return 2 if call.cache.format.bits <= 8 and side_by_side and even and units >= 32 else 1


def _stride(spec: ArraySpec | None) -> int:
    return 0 if spec is None else spec.steps[0]
