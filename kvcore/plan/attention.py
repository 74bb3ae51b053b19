"""Launch plans of `paged_attention_kernel` and `merge_attention_kernel`: plain numbers, made from no data."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kvcore.arrays import ArraySpec
from kvcore.contract.read import Attention
from kvcore.formats import BFLOAT16, DS_MLA_ROPE, FLOAT16, FLOAT32, FLOATS, FP8_DS_MLA, NVFP4, FloatFormat
from kvcore.plan.attention_constants import AttentionConstants, CacheRows, QueryRows, Tile, cache_rows, choose_word
from kvcore.plan.attention_tile import balance_splits, choose_heads, choose_splits, choose_tile, cover, many_rows
from kvcore.plan.hopper import plan_hopper
from kvcore.plan.kernel import KernelPlan, Target, has_e4m3
from kvcore.plan.rows import power_of_two, scale_rows


class AttentionPlan(NamedTuple):
    """How to launch `paged_attention_kernel` and, where positions are split, `merge_attention_kernel`.

    Attributes:
        attend: The kernel that attends.
        grid: Its programs along each axis.
        splits: Splits of the positions; their partial results are merged if there are more than one.
        merge: The kernel that merges partial results.
        merge_grid: Its programs.
    """

    attend: KernelPlan
    grid: tuple[int, int, int]
    splits: int
    merge: KernelPlan
    merge_grid: tuple[int, int, int]


_FUSED: dict[str, Any] = {"enable_fp_fusion": True}
"""Options for arithmetic whose last bits nothing depends on: a multiplication and an addition may become one."""

_FLOAT16_WEIGHT_BITS = 14.0
"""In float16, weights are at most 2^14, not 1: then all that are at least 2^-28 of the largest keep float16's
precision. Smaller ones lose bits, but a sum would need millions of those for that to show."""

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


@lru_cache(maxsize=4096)
def plan_attention(
    call: Attention,
    target: Target,
    layer_is_pointer: bool = False,
    even_addresses: bool = True,
    descriptors: bool = False,
) -> AttentionPlan:
    """The plan for attention on a target.

    Args:
        call: From `kvcore.contract.read.check_attention`.
        target: What to compile for.
        layer_is_pointer: Whether the kernel loads the layer's index from memory.
        even_addresses: Whether the caches begin at even addresses.
        descriptors: Whether kernels in Gluon can be launched, and the caches begin at multiples of 16.
    """
    extents = call.cache.extents
    tokens, q_heads, _ = call.query.shape
    num_seqs = call.block_tables.shape[0]
    compute = _compute(call, target)
    choice = choose_tile(call, target, compute)
    hopper = plan_hopper(call, target, many_rows(call)) if descriptors else None
    if hopper is not None:
        choice = choice._replace(tile=hopper.tile, warps=4, programs=1)
    tile, warps = choice.tile, choice.warps
    # Tiles of query rows: the full ones, and one more for each sequence, and for the tokens before and after all.
    q_per_kv = q_heads // extents.num_heads
    if call.query_start_loc is not None:
        row_tiles = tokens * q_per_kv // tile.rows + num_seqs + 2
    else:
        row_tiles = num_seqs * -(-q_per_kv // tile.rows)
    programs = row_tiles * extents.num_heads
    min_tiles = max(1, choice.positions // tile.positions)
    balanced = hopper is not None and call.cache.layout.latent
    splits = balance_splits(call, choice, target) if balanced else choose_splits(call, choice, target)
    options = dict(_FUSED)
    if tile.rows == 128 and warps == 8 and compute.bits == 16 and target.backend == "cuda":
        options["maxnreg"] = 128  # so that two programs fit on a multiprocessor
    constants = _constants(call, target, layer_is_pointer, even_addresses, tile, splits > 1, min_tiles)
    attend = KernelPlan(
        module="attention" if hopper is None else hopper.module,
        name="paged_attention_kernel" if hopper is None else hopper.name,
        num_warps=warps,
        scalars=SCALARS,
        constexprs={"P": constants} if hopper is None else {"P": constants, "H": hopper.constants},
        options=options,
        descriptors={} if hopper is None else hopper.descriptors,
    )
    merge = _merge(call, target, splits)
    merge_grid = (tokens * q_heads, -(-call.cache.head_size_v // merge.constexprs["COLUMNS"]), 1)
    return AttentionPlan(attend, (programs, splits, 1), splits, merge, merge_grid)


def _merge(call: Attention, target: Target, splits: int) -> KernelPlan:
    """The kernel that merges partial results."""
    columns = min(power_of_two(call.cache.head_size_v), 128)
    # All of up to 64 are loaded at once; sums of warps are added only where there are many.
    lanes = 1 if splits <= 16 else 4
    parts = min(16, power_of_two(-(-splits // lanes)))
    return KernelPlan(
        module="merge",
        name="merge_attention_kernel",
        num_warps=4,
        scalars=MERGE_SCALARS,
        constexprs={
            "NUM_HEADS": call.query.shape[1],
            "HEAD_SIZE": call.cache.head_size_v,
            "SINK_STRIDE": _stride(call.sinks),
            "OUT": _out(call, target),
            "PARTS": parts,
            "LANES": lanes,
            "COLUMNS": columns,
        },
        options=_FUSED,
    )


def _constants(
    call: Attention,
    target: Target,
    layer_is_pointer: bool,
    even_addresses: bool,
    tile: Tile,
    split: bool,
    min_tiles: int,
) -> AttentionConstants:
    """What the kernel knows when it is compiled."""
    k, v, rope = _cache_rows(call, even_addresses)
    compute, ragged = _compute(call, target), call.query_start_loc is not None
    return AttentionConstants(
        query=_query_rows(call),
        k=k,
        v=v,
        rope=rope,
        v_in_k=call.cache.layout.latent and v.words == k.main,
        block_size=call.cache.extents.block_size,
        layer_is_pointer=layer_is_pointer,
        options=call.options,
        ragged=ragged,
        by_row=ragged and call.options.causal,
        compute=compute,
        weight_bits=_FLOAT16_WEIGHT_BITS if compute == FLOAT16 else 0.0,
        out=_out(call, target),
        hardware=_converts_in_hardware(call.cache.format, target),
        tile=tile,
        careful_tile=Tile(16, min(tile.positions, 32), 1),
        whole_tiles=ragged and tile.rows > 16 and call.options.sliding_window is None,
        split=split,
        min_tiles=min_tiles,
        heads_at_once=choose_heads(call),
    )


def _query_rows(call: Attention) -> QueryRows:
    token_stride, head_stride, dim_stride = call.query.steps
    k_strides, v_strides = call.cache.scale_strides
    q_heads, kv_heads = call.query.shape[1], call.cache.extents.num_heads
    return QueryRows(
        num_heads=q_heads,
        num_kv_heads=kv_heads,
        q_per_kv=q_heads // kv_heads,
        offset=call.query.offset,
        token_stride=token_stride,
        head_stride=head_stride,
        dim_stride=dim_stride,
        groups=call.query.groups,
        table_step=call.block_tables.steps[1],
        lens_stride=_stride(call.seq_lens),
        start_stride=_stride(call.query_start_loc),
        sink_stride=_stride(call.sinks),
        k_scale_stride=k_strides[0],
        v_scale_stride=v_strides[0],
        k_layer_scale_stride=k_strides[1],
        v_layer_scale_stride=v_strides[1],
    )


def _cache_rows(call: Attention, even_addresses: bool) -> tuple[CacheRows, CacheRows, CacheRows | None]:
    """K, V and the rotary part, if that is in a format of its own."""
    cache, stored = call.cache, call.cache.format
    (extents, key, value), scales = cache.placement, cache.scales
    k_units, v_units = extents.head_units, extents.head_units_v
    k_word = choose_word(stored, key, k_units) if even_addresses else 1
    v_word = choose_word(stored, value, v_units) if even_addresses else 1
    if cache.layout.latent:  # V is a part of K's tile
        k_word = v_word = min(k_word, v_word)
    k_scales = v_scales = None
    if scales is not None:
        k_scales = scale_rows(scales, scales.placement.key, cache.head_size, stored)
        v_scales = scale_rows(scales, scales.placement.value, cache.head_size_v, stored)
    rope, k_tile = None, cover(k_units // k_word)
    if cache.rope is not None:
        k_tile = (k_units // k_word, 0)
        rope = cache_rows(cache, cache.rope, BFLOAT16, DS_MLA_ROPE, 1, (DS_MLA_ROPE, 0), None)
    v_tile = (max(16, power_of_two(v_units // v_word)), 0)
    return (
        cache_rows(cache, key, stored, k_units, k_word, k_tile, k_scales),
        cache_rows(cache, value, stored, v_units, v_word, v_tile, v_scales),
        rope,
    )


def _compute(call: Attention, target: Target) -> FloatFormat:
    """What K, V and weights are multiplied in: query's dtype, unless the cache has numbers that it lacks."""
    query, cache = FLOATS[call.query.dtype], call.cache.format
    if target.backend == "interpret" or (cache.name in FLOATS and cache != query):
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


def _out(call: Attention, target: Target) -> FloatFormat | None:
    """The format to round results to with integers: the interpreter's own casts are wrong."""
    return FLOATS[call.query.dtype] if target.backend == "interpret" else None


def _stride(spec: ArraySpec | None) -> int:
    return 0 if spec is None else spec.steps[0]
